"""Fake quantization of Keras tensors, differentiable: the core's pair as a function with a gradient of its own.

Composed of divide, round, clip and multiply, as the reference grid is; scales are variables, so that no compiler can
turn the division into a product with a reciprocal that it computed beforehand.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from bitwright.grids import CODE_TABLES, DTYPES, FloatFormat, Groups, cast_vjp, largest_of, learned_vjp, rounded_vjp
from bitwright_keras.graph.engine import clip, in_one_pass, opaque, with_gradient


class KerasNamespace:
    """`bitwright.grids._gradients.Namespace` of keras.ops, and the namespaces that extend it."""

    @staticmethod
    def round(x: Any, /) -> Any:
        """To the nearest integer, halves to even."""
        return ops.round(x)

    @staticmethod
    def clip(x: Any, low: Any, high: Any, /) -> Any:
        """Between two arrays."""
        return clip(x, low, high)

    @staticmethod
    def where(mask: Any, x: Any, y: Any, /) -> Any:
        """x where the mask is true, else y."""
        return ops.where(mask, x, y)

    @staticmethod
    def sum(x: Any, axes: tuple[int, ...], /) -> Any:
        """Over these axes, which go."""
        return ops.sum(x, axis=axes)

    @staticmethod
    def reshape(x: Any, shape: tuple[int, ...], /) -> Any:
        """The same elements in another shape."""
        return ops.reshape(x, shape)

    @staticmethod
    def transpose(x: Any, axes: tuple[int, ...], /) -> Any:
        """Axes in another order."""
        return ops.transpose(x, axes)

    # -- of `range_numbers.RangeNamespace`

    lowest = staticmethod(ops.min)
    highest = staticmethod(ops.max)
    minimum = staticmethod(ops.minimum)
    maximum = staticmethod(ops.maximum)
    filled = staticmethod(ops.full_like)

    @staticmethod
    def divided(x: Any, by: float, /) -> Any:
        """x / by."""
        return ops.divide(x, ops.cast(opaque(by), x.dtype))

    @staticmethod
    def float64(x: Any, /) -> Any:
        """In double."""
        return ops.cast(x, "float64")

    @staticmethod
    def float32(x: Any, /) -> Any:
        """In single."""
        return ops.cast(x, "float32")

    # -- of `run_time.RunTimeNamespace`

    @staticmethod
    def spans(x: Any, per_token: bool, /) -> tuple[Any, Any]:
        """Minimum and maximum of rows, or of all values."""
        axis = -1 if per_token else None
        return ops.min(x, axis=axis, keepdims=per_token), ops.max(x, axis=axis, keepdims=per_token)

    # -- of `training_rules.TrainingNamespace`

    exp = staticmethod(ops.exp)
    stop = staticmethod(ops.stop_gradient)


NAMESPACE = KerasNamespace()


def round_to_grid(
    x: Any,
    scale: Any,
    low: Any,
    high: Any,
    *,
    learned: bool = False,
    moves: bool = True,
    factor: float = 1.0,
    compiled: bool = False,
) -> Any:
    """clip(round(x / scale), low, high) · scale, gradients passed straight through within the grid.

    Args:
        x: float32 tensor.
        scale: broadcasts against x.
        low, high: the grid's ends as seen from its zero (qmin − z, qmax − z); of scale's shape.
        learned: gradients to the scale and the ends too. A zero point's is the sum of those of both ends, negated:
            each gets what lies beyond it.
        moves: where a scale is learned, so is a zero point.
        factor: of the gradients to scale and ends.
        compiled: see `engine.in_one_pass`.
    """

    @with_gradient
    def rounded(x: Any, scale: Any, low: Any, high: Any) -> Any:
        with in_one_pass(compiled):
            y = clip(ops.round(ops.divide(x, scale)), low, high) * scale

        def gradient(*upstream: Any, **named: Any) -> Any:
            g = _upstream(upstream, named)
            if not learned:
                with in_one_pass(compiled):
                    dx = rounded_vjp(NAMESPACE, g, x, scale, low, high)
                return dx, *(ops.zeros_like(v) for v in (scale, low, high))
            with in_one_pass(compiled):
                dx, ds, dz = learned_vjp(NAMESPACE, g, x, scale, low, high)
            # ∂z is −∂low and −∂high together; low = qmin − z carries it all, so that the sum over both is right.
            dlow = -summed_to(dz, scale) * factor if moves else ops.zeros_like(low)
            return dx, summed_to(ds, scale) * factor, dlow, ops.zeros_like(high)

        return y, gradient

    return rounded(x, scale, low, high)


def round_wide(x: Any, scale: Any, low: Any, high: Any) -> Any:
    """The same for grids of more than 24 bits, in float64; straight through."""
    wide = ops.cast(x, "float64")
    q = ops.round(wide / ops.cast(scale, "float64"))
    q = ops.minimum(ops.maximum(q, ops.cast(low, "float64")), ops.cast(high, "float64"))
    y = ops.cast(q, "float32") * scale
    return x + ops.stop_gradient(y - x)


def round_to_float(x: Any, scale: Any, form: FloatFormat, *, learned: bool = False, factor: float = 1.0) -> Any:
    """x in a float format and back, saturating at its largest value; bit-equal to `grid.cast_float`."""
    largest = largest_of(form)

    @with_gradient
    def rounded(x: Any, scale: Any) -> Any:
        r = ops.divide(x, scale)
        if form in CODE_TABLES:
            y = CODE_TABLES[form].rounded(NAMESPACE, r) * scale
        else:
            y = ops.cast(ops.cast(ops.clip(r, -largest, largest), DTYPES[form]), "float32") * scale

        def gradient(*upstream: Any, **named: Any) -> Any:
            g = _upstream(upstream, named)
            groups = Groups((), (), (), (), ())
            dx, ds, _ = cast_vjp(NAMESPACE, g, x, y, scale, largest, groups, learned=learned)
            return dx, ops.zeros_like(scale) if ds is None else summed_to(ds, scale) * factor

        return y, gradient

    return rounded(x, scale)


def _upstream(upstream: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The gradient to the output; TensorFlow and JAX give it by position, PyTorch's way may name it."""
    return named["upstream"] if "upstream" in named else upstream[0]


def summed_to(x: Any, like: Any) -> Any:
    """The sum over the axes along which `like` is broadcast, in its shape."""
    rank = len(like.shape)
    if not rank:
        return ops.sum(x)
    axes = tuple(i for i in range(rank) if like.shape[i] == 1)
    return ops.sum(x, axis=axes, keepdims=True) if axes else x
