"""What a dataflow backend needs of a framework's arrays: nothing beyond numpy's functions, if it has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import TapNamespace
from bitwright.graph import LEAK, Formula, erf
from bitwright.grids import FLOAT_FORMATS, FloatFormat, RunTimeNamespace, TrainingNamespace

Array = Any
"""An array of the framework."""
_SELU = 1.0507009873554805, 1.6732632423543772


class FlowNamespace(TrainingNamespace, RunTimeNamespace, TapNamespace, Protocol):
    """All that the base asks of a framework: grids, taps, float formats and the activations that edits put in."""

    def highest(self, x: Array, axes: tuple[int, ...] | None, /) -> Array:
        """The maximum over these axes, which go; over all for None."""

    @property
    def functions(self) -> Mapping[str, Callable[..., Array]]:
        """Elementwise functions by the names of a `Formula`. `ACTIVATION_TYPES` that aren't here are spelled out."""

    def exactly(self) -> AbstractContextManager[Any]:
        """While it is open, `float64` is in double precision, where the framework has to be told."""

    def cast(self, x: Array, format: FloatFormat, /) -> Array:
        """float32 values, none beyond the format's largest, in a float format and back."""


class NumpyLike:
    """`FlowNamespace` over a module with numpy's functions (`numpy`, `jax.numpy`, …).

    A compiler that isn't IEEE to the bit, or differentiates, needs a few methods of its own: `divided`, `stop`,
    `float64`.

    Args:
        xp: the module.
        erf: the error function, elementwise.
    """

    def __init__(self, xp: Any, erf: Callable[[Array], Array] = lambda x: erf(x).astype(x.dtype)) -> None:
        self.xp, self._erf = xp, erf

    # -- `Namespace` and `RangeNamespace`

    def round(self, x: Array, /) -> Array:
        """Halves to even."""
        return self.xp.rint(x)

    def clip(self, x: Array, low: Array, high: Array, /) -> Array:
        """Between two arrays."""
        return self.xp.clip(x, low, high)

    def where(self, mask: Array, x: Array, y: Array, /) -> Array:
        """x where the mask is true, else y."""
        return self.xp.where(mask, x, y)

    def sum(self, x: Array, axes: tuple[int, ...], /) -> Array:
        """Over these axes."""
        return self.xp.sum(x, axis=axes)

    def reshape(self, x: Array, shape: tuple[int, ...], /) -> Array:
        """The same elements in another shape."""
        return self.xp.reshape(x, shape)

    def transpose(self, x: Array, axes: tuple[int, ...], /) -> Array:
        """Axes in another order."""
        return self.xp.transpose(x, axes)

    def lowest(self, x: Array, axes: tuple[int, ...], /) -> Array:
        """Minimum over axes."""
        return self.xp.min(x, axis=axes)

    def highest(self, x: Array, axes: tuple[int, ...] | None, /) -> Array:
        """Maximum over axes; over all for None."""
        return self.xp.max(x, axis=axes) if math.prod(x.shape) else self._nothing(x, axes, -math.inf)

    def minimum(self, x: Array, y: Array, /) -> Array:
        """The smaller of two."""
        return self.xp.minimum(x, y)

    def maximum(self, x: Array, y: Array, /) -> Array:
        """The larger of two."""
        return self.xp.maximum(x, y)

    def divided(self, x: Array, by: float, /) -> Array:
        """x / by, correctly rounded."""
        return x / self.xp.asarray(by, x.dtype)

    def filled(self, x: Array, value: float, /) -> Array:
        """An array of x's shape and type that holds one value."""
        return self.xp.full_like(x, value)

    def float64(self, x: Array, /) -> Array:
        """In double."""
        return self.xp.asarray(x).astype("float64")

    def float32(self, x: Array, /) -> Array:
        """In single."""
        return self.xp.asarray(x).astype("float32")

    # -- `RunTimeNamespace`

    def spans(self, x: Array, per_token: bool, /) -> tuple[Array, Array]:
        """Minimum and maximum of rows, or of all values."""
        axis = -1 if per_token else None
        return self.xp.min(x, axis=axis, keepdims=per_token), self.xp.max(x, axis=axis, keepdims=per_token)

    # -- `TrainingNamespace`

    def exp(self, x: Array, /) -> Array:
        """e to the power of x."""
        return self.xp.exp(x)

    def stop(self, x: Array, /) -> Array:
        """x, without a gradient."""
        return x

    # -- `TapNamespace`

    def shape(self, x: Array, /) -> tuple[int, ...]:
        """The shape."""
        return tuple(x.shape)

    def extremes(self, x: Array, axes: tuple[int, ...] | None, /) -> tuple[Array, Array]:
        """Minimum and maximum; of nothing +∞ and −∞."""
        if not math.prod(x.shape):
            return self._nothing(x, axes, math.inf), self._nothing(x, axes, -math.inf)
        return self.xp.min(x, axis=axes), self.xp.max(x, axis=axes)

    def pair(self, low: Array, high: Array, /) -> Array:
        """Both, float32."""
        return self.float32(self.xp.stack([low, high]))

    def zeros_like(self, x: Array, /) -> Array:
        """Zeros."""
        return self.xp.zeros_like(x)

    def by_sample(self, x: Array, /) -> Array:
        """(samples, size)."""
        return self.xp.reshape(x, (x.shape[0], -1))

    def second(self, x: Array, axis: int, /) -> Array:
        """An axis moved to place 1."""
        return self.xp.moveaxis(x, axis, 1)

    def every(self, x: Array, step: int, /) -> Array:
        """Every `step`-th column."""
        return x[:, ::step]

    def take(self, x: Array, places: NDArray[np.integer], /) -> Array:
        """These columns."""
        return x[:, places]

    # -- `FlowNamespace`

    def exactly(self) -> AbstractContextManager[Any]:
        """It is anyway."""
        return nullcontext()

    def cast(self, x: Array, format: FloatFormat, /) -> Array:
        """A power of two before and after leaves whole numbers to round: bit-equal to `grid.cast_float`."""
        exponent_bits, mantissa_bits, _ = FLOAT_FORMATS[format]
        _, exponent = self.xp.frexp(x)
        shift = self.xp.maximum(exponent - 1, 2 - 2 ** (exponent_bits - 1)) - mantissa_bits
        return self.xp.ldexp(self.xp.rint(self.xp.ldexp(x, -shift)), shift)

    @cached_property
    def functions(self) -> Mapping[str, Callable[..., Array]]:
        """What all frameworks have; the others of `ACTIVATION_TYPES` are spelled out in these."""
        xp = self.xp

        def below(x: Array, negative: float) -> Array:
            return xp.where(x > 0, x, negative * xp.expm1(xp.minimum(x, 0)))

        def sigmoid(x: Array) -> Array:
            small = xp.exp(-xp.abs(x))
            return xp.where(x >= 0, 1 / (1 + small), small / (1 + small))

        return {
            "Identity": lambda x: x,
            "Relu": lambda x: xp.maximum(x, 0),
            "Relu6": lambda x: xp.clip(x, 0, 6),
            "LeakyRelu": lambda x: xp.where(x < 0, x * LEAK, x),
            "Elu": lambda x: below(x, 1.0),
            "Selu": lambda x: _SELU[0] * below(x, _SELU[1]),
            "Sigmoid": sigmoid,
            "Tanh": xp.tanh,
            "Softplus": lambda x: xp.logaddexp(x, 0),
            "Abs": xp.abs,
            "Erf": self._erf,
            "Add": lambda x, y: x + y,
            "Mul": lambda x, y: x * y,
            "Div": lambda x, y: x / y,
        }

    def _nothing(self, x: Array, axes: tuple[int, ...] | None, value: float) -> Array:
        kept = () if axes is None else tuple(n for i, n in enumerate(x.shape) if i not in axes)
        return self.xp.full(kept, value, np.float32)


def evaluated(ns: FlowNamespace, formula: Formula, x: Array) -> Array:
    """What a formula gives for a tensor."""
    operands = (
        x if o is None else evaluated(ns, o, x) if isinstance(o, Formula) else o for o in formula.operands
    )  # fmt: skip
    return ns.functions[formula.type](*operands)
