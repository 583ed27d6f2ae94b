"""Fake quantization as TensorFlow ops, and the numbers that they read: bit-equal to `Encoding.fake_quantize`.

Division, rounding (half to even), clipping and multiplication are composed; `tf.quantization`'s own ops round halves
up. Every number is read from a variable or computed from one: grappler turns a division by a constant into a
multiplication by its rounded reciprocal, which moves midpoints.

For training, `trained` has the grid's values and the gradients of `bitwright.grids._gradients` by means of standard ops
alone: y = stop_gradient(ŷ) + (t − stop_gradient(t)), where t is a finite surrogate with the wanted derivatives. So the
value is ŷ to the bit, and a written graph trains in a process without bitwright, which a `tf.custom_gradient` (a
Python function) wouldn't. Each of those ops is a pass over memory, so the nodes of large activations say that XLA may
compile them, and what TensorFlow's own gradients make of them, into one. It is a hint, an attribute of nodes, which a
runtime without XLA passes over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.grids import (
    CODE_TABLES,
    DTYPES,
    FLOAT_FORMATS,
    WIDE,
    Encoding,
    Groups,
    PerTensor,
    QuantSpec,
    RunTimeGrid,
    extents,
    largest_of,
    run_time_rounded,
    spread,
)

Node = Any
"""A symbolic tensor of a graph under construction."""
Numbers = Mapping[str, NDArray[Any]]


class TfNamespace:
    """`bitwright.grids._gradients.Namespace` of TensorFlow, and the namespaces that extend it."""

    round = staticmethod(tf.round)
    where = staticmethod(tf.where)
    reshape = staticmethod(tf.reshape)
    transpose = staticmethod(tf.transpose)

    @staticmethod
    def clip(x: Node, low: Node, high: Node, /) -> Node:
        """Between two broadcast tensors."""
        return tf.minimum(tf.maximum(x, low), high)

    @staticmethod
    def sum(x: Node, axes: tuple[int, ...], /) -> Node:
        """Sum over axes."""
        return tf.reduce_sum(x, axes)

    # -- of `range_numbers.RangeNamespace`

    lowest = staticmethod(tf.reduce_min)
    highest = staticmethod(tf.reduce_max)
    minimum = staticmethod(tf.minimum)
    maximum = staticmethod(tf.maximum)

    @staticmethod
    def divided(x: Node, by: float, /) -> Node:
        """x / by, in x's type; grappler doesn't see the value, as it would multiply by its reciprocal."""
        return x / tf.raw_ops.PlaceholderWithDefault(input=np.asarray(by, x.dtype.as_numpy_dtype), shape=[])

    @staticmethod
    def filled(x: Node, value: float, /) -> Node:
        """One value in x's shape and type."""
        return tf.zeros_like(x) + value

    @staticmethod
    def float64(x: Node, /) -> Node:
        """In double."""
        return tf.cast(x, tf.float64)

    @staticmethod
    def float32(x: Node, /) -> Node:
        """In single."""
        return tf.cast(x, tf.float32)

    # -- of `run_time.RunTimeNamespace`

    @staticmethod
    def spans(x: Node, per_token: bool, /) -> tuple[Node, Node]:
        """Minimum and maximum of rows, or of all values."""
        axis = -1 if per_token else None
        return tf.reduce_min(x, axis, keepdims=per_token), tf.reduce_max(x, axis, keepdims=per_token)

    # -- of `training_rules.TrainingNamespace`

    exp = staticmethod(tf.exp)
    stop = staticmethod(tf.stop_gradient)


NAMESPACE = TfNamespace()


def kind_of(encoding: Encoding | QuantSpec) -> str:
    """Which ops an encoding needs: "integer" (below 24 bits), "wide", "run time", or the name of a float format."""
    if encoding.run_time is not None:
        return "run time"
    if encoding.float_format is not None:
        return encoding.float_format
    return "wide" if encoding.grid.steps >= WIDE else "integer"


@dataclass(frozen=True, slots=True)
class SiteForm:
    """What a site's ops can compute: other numbers are assigned, another chain needs another graph.

    Attributes:
        kind: see `kind_of`.
        spread: whether scales vary over the tensor. The ops would be the same, but their variables then have no fixed
            shape, and where grappler can't tell shapes it fuses what no kernel computes (grouped convolutions).
        run_time: the codes of a range at run time.
    """

    kind: str = "integer"
    spread: bool = False
    run_time: RunTimeGrid | None = None

    @classmethod
    def of(cls, encoding: Encoding | QuantSpec | None) -> SiteForm:
        """The chain for an encoding or a specification."""
        if encoding is None:
            return cls()
        if encoding.run_time is not None:
            return cls(kind_of(encoding), run_time=encoding.run_time)
        return cls(kind_of(encoding), not isinstance(encoding.granularity, PerTensor))

    def shape(self, rank: int | None) -> tuple[int | None, ...] | None:
        """Static shape of its variables, for a tensor of `rank`."""
        if not self.spread:
            return ()
        return None if rank is None else (None,) * rank


OPERANDS: dict[str, dict[str, Any]] = {
    "integer": {"scale": np.float32, "low": np.float32, "high": np.float32},
    "wide": {"scale": np.float32, "zero": np.float64, "low": np.float64, "high": np.float64},
    "run time": {},
    "float16": {},
    "bfloat16": {},
    "float8e4m3fn": {"scale": np.float32},
    "float8e5m2": {"scale": np.float32},
    **{name: {"scale": np.float32} for name in CODE_TABLES},
}
"""The variables that the ops of each kind read, with their types."""


def numbers(kind: str, encoding: Encoding | None, rank: int | None) -> dict[str, NDArray[Any]]:
    """The operands of one kind of ops for an encoding, shaped to broadcast against a tensor of `rank`.

    None gives harmless numbers for a bypassed site.

    Raises:
        EncodingError: an axis is out of range, or the rank isn't known where scales vary.
    """
    if encoding is None:
        return {name: np.ones((1,) * (rank or 0), dtype) for name, dtype in OPERANDS[kind].items()}
    if not OPERANDS[kind]:
        return {}
    scale, zero = _spread(encoding.scale, encoding, rank), _spread(encoding.zero_point, encoding, rank)
    found: dict[str, NDArray[Any]] = {"scale": scale}
    if kind == "integer":
        base = zero.astype(np.float32)
        found |= {"low": encoding.grid.qmin - base, "high": encoding.grid.qmax - base}
    elif kind == "wide":
        ends = (np.full_like(zero, end) for end in (encoding.grid.qmin, encoding.grid.qmax))
        found |= {"zero": zero, **dict(zip(("low", "high"), ends, strict=True))}
    return {name: np.asarray(found[name], dtype) for name, dtype in OPERANDS[kind].items()}


def _spread(values: NDArray[Any], encoding: Encoding, rank: int | None) -> NDArray[Any]:
    """Values that broadcast against the tensor; its dimensions aren't needed but those that carry scales."""
    if isinstance(encoding.granularity, PerTensor):
        return values
    if rank is None:
        raise EncodingError("only one scale for the whole tensor can be set on a tensor of unknown rank")
    return np.asarray(spread(values, extents(encoding, rank), encoding.granularity))


def rounded(kind: str, x: Node, operands: Mapping[str, Node], run_time: RunTimeGrid | None = None) -> Node:
    """x on a grid, in x's type; the numbers broadcast against it.

    Args:
        kind: see `kind_of`.
        x: any float tensor.
        operands: tensors by the names in `OPERANDS`.
        run_time: the codes of a range at run time.
    """
    value = tf.cast(x, tf.float32)
    if run_time is not None:
        y = run_time_rounded(NAMESPACE, value, run_time)
    elif kind == "integer":
        scale = operands["scale"]
        y = NAMESPACE.clip(tf.round(value / scale), operands["low"], operands["high"]) * scale
    elif kind == "wide":
        # Codes of 32 bits don't fit float32, so the grid is computed in double, as the reference does.
        scale, zero = operands["scale"], operands["zero"]
        q = tf.round(tf.cast(value, tf.float64) / tf.cast(scale, tf.float64)) + zero
        q = NAMESPACE.clip(q, operands["low"], operands["high"])
        y = tf.cast(q - zero, tf.float32) * scale
    elif kind in ("float16", "bfloat16"):
        y = cast_to(kind, value)
    else:
        y = cast_to(kind, value / operands["scale"]) * operands["scale"]
    return tf.cast(y, x.dtype)


def cast_to(kind: str, x: Node) -> Node:
    """float32 values rounded to a float format, saturating, as float32."""
    if kind in CODE_TABLES:
        return CODE_TABLES[kind].rounded(NAMESPACE, x)
    largest = FLOAT_FORMATS[kind][2]
    # Casts to float16 and bfloat16 overflow to infinity; the reference saturates.
    saturated = tf.minimum(tf.maximum(x, np.float32(-largest)), np.float32(largest))
    return tf.cast(tf.cast(saturated, DTYPES[kind]), tf.float32)


def switched(
    x: Node, on: Node, kind: str, operands: Mapping[str, Node], name: str, run_time: RunTimeGrid | None = None
) -> Node:
    """`rounded` while `on`, x itself otherwise: no op of the grid then runs. For inference.

    Args:
        on: scalar bool.
        name: of the last node.
        run_time: the codes of a range at run time.
    """
    passed, taken = tf.raw_ops.Switch(data=x, pred=on)
    return tf.raw_ops.Merge(inputs=[passed, rounded(kind, taken, operands, run_time)], name=name).output


COMPILED_FROM = 2**13
"""Values of a sample from which an activation's rounding is compiled: for fewer it takes longer than it saves."""
COMPILED_PARAMETER = 2**16
"""Values from which a parameter's is."""


QUOTIENT, RAISED, HELD, CLIPPED, STEPS, SHAPED = "quotient", "raised", "held", "clipped", "scale_steps", "steps"
"""Names of nodes of a site with one learned scale, by which `recomputed` finds them."""
COLUMNS = 64
"""Columns from which XLA sums fast over the rows of a matrix."""


def compiles(x: Node, *, parameter: bool = False) -> bool:
    """Whether the rounding of a tensor is compiled: of a large one, on CPUs; on GPUs, XLA's division isn't exact."""
    if tf.config.list_physical_devices("GPU"):
        return False
    sizes = [] if x.shape.rank is None else x.shape.as_list()
    values = math.prod(n or 1 for n in (sizes if parameter else sizes[1:]))
    return bool(values >= (COMPILED_PARAMETER if parameter else COMPILED_FROM))


def in_one_pass(wanted: bool) -> AbstractContextManager[Any]:
    """Lets XLA compile what is made within, and what becomes of it in a gradient, where that is wanted (`compiles`)."""
    if not wanted:
        return nullcontext()
    scope: AbstractContextManager[Any] = tf.xla.experimental.jit_scope(separate_compiled_gradients=True)
    return scope


def _apart(compiled: bool) -> AbstractContextManager[Any]:
    """What is made within `in_one_pass` isn't compiled, nor are its gradients."""
    if not compiled:
        return nullcontext()
    scope: AbstractContextManager[Any] = tf.xla.experimental.jit_scope(compile_ops=False)
    return scope


def chosen(on: Node, x: Node, y: Node) -> Node:
    """x or y by a scalar; `tf.where` would broadcast the scalar, at 20 times the cost."""
    return tf.raw_ops.Select(condition=on, x=x, y=y)


@dataclass(frozen=True)
class Ends:
    """A trained site's numbers in the graph, all float32 (float64 for "wide") and of the encoding's scale shape.

    Attributes:
        kind: see `kind_of`.
        scale, zero: differentiable where they are learned.
        qmin, qmax: the codes' ends, scalars.
        learned: whether gradients to scale and zero point are wanted.
        moves: whether gradients to the zero point are wanted.
    """

    kind: str
    scale: Node
    zero: Node
    qmin: Node
    qmax: Node
    learned: bool = False
    moves: bool = False


def trained(
    x: Node,
    ends: Ends,
    groups: Groups,
    on: Node,
    *,
    factor: Node | float = 1.0,
    name: str,
    compiled: bool = False,
) -> Node:
    """x on a grid with the gradients of `bitwright.grids.fake_quantize_vjp` (`cast_vjp` for float formats).

    Args:
        x: any float tensor.
        ends: the grid.
        groups: which elements of x share a scale.
        on: scalar bool; while false x passes, with its gradient, and the grid gets none.
        factor: of the gradients to scale and zero point.
        name: of the last node.
        compiled: it is called within `in_one_pass`.
    """
    if ends.kind == "integer" and not groups.scale:
        columns = _columns(x) if ends.learned else 0
        if columns is not None:
            return _clipped(x, ends, on, columns, factor, name, compiled)
    stop, ns = tf.stop_gradient, NAMESPACE
    value = groups.cut(ns, tf.cast(x, tf.float64 if ends.kind == "wide" else tf.float32))
    scale, zero = (groups.broadcast(ns, chosen(on, v, stop(v))) for v in (ends.scale, ends.zero))
    s, nil = stop(scale), tf.zeros_like(value)
    r = stop(value / s)
    if ends.kind in FLOAT_FORMATS or ends.kind in CODE_TABLES:
        largest = np.float32(largest_of(ends.kind))  # type: ignore[arg-type]
        held = cast_to(ends.kind, r)
        inside = tf.logical_and(r >= -largest, r <= largest)
    else:
        # What the grid keeps has exactly this quotient; nothing else does, NaN neither.
        low, high = ends.qmin - stop(zero), ends.qmax - stop(zero)
        q = tf.round(r)
        held = ns.clip(q, low, high)
        inside = tf.equal(q, held)
    inside = stop(tf.logical_or(inside, tf.logical_not(on)))
    # Of the surrogate only the derivatives matter; it must be finite, so that it cancels.
    t = tf.raw_ops.Select(condition=inside, x=value, y=nil)
    if ends.learned:
        share = held - tf.raw_ops.Select(condition=inside, x=r, y=nil)
        t += scale * stop(share * factor)
    if ends.moves:
        t += zero * stop(tf.raw_ops.Select(condition=inside, x=nil, y=nil - s * factor))
    y = stop(chosen(on, held * s, value))
    if ends.kind == "wide":
        y = stop(chosen(on, tf.cast(tf.cast(held, tf.float32) * tf.cast(s, tf.float32), tf.float64), value))
    y = groups.joined(ns, y + (t - stop(t)))
    return tf.identity(tf.cast(y, x.dtype), name=name)


def _clipped(x: Node, ends: Ends, on: Node, columns: int, factor: Node | float, name: str, compiled: bool) -> Node:
    """`trained` for one scale: t = x between the least and the largest value that isn't clipped.

    TensorFlow's gradient of that is made of x and the two limits, so that nothing is kept for it. A zero point moves
    the limits. A learned scale is multiplied by what a step of it makes of each value, the one tensor that is kept (see
    `recomputed`); its gradient is a sum over the rows of a matrix, which XLA takes in the pass that multiplies, and
    over no other shape.

    Args:
        columns: of the matrix, where the scale is learned.
    """
    stop = tf.stop_gradient
    largest = np.finfo(np.float32).max
    with _apart(compiled):  # numbers of the grid: each would be a program of its own
        s, zero = stop(ends.scale), stop(ends.zero)
        low, high = ends.qmin - zero, ends.qmax - zero
        least, most = tf.unstack(_largest_kept(s, tf.stack([-low, high])))
        least = -least
        if ends.moves:
            moved = (ends.zero - zero) * (s * factor)  # 0
            least, most = least - moved, most - moved
        least, most = chosen(on, least, tf.fill([], -largest)), chosen(on, most, tf.fill([], largest))
        scales = tf.broadcast_to(chosen(on, ends.scale, s) * factor, [columns]) if ends.learned else None
    value = tf.cast(x, tf.float32)
    r = stop(tf.math.divide(value, s, name=QUOTIENT))
    q = tf.round(r)
    held = tf.minimum(tf.maximum(q, low, name=RAISED), high, name=HELD)
    y = stop(chosen(on, held * s, value))
    t = tf.raw_ops.ClipByValue(t=value, clip_value_min=least, clip_value_max=most, name=CLIPPED)
    if scales is not None:
        share = held - tf.raw_ops.Select(condition=tf.equal(q, held), x=r, y=tf.zeros_like(r))
        steps = tf.multiply(scales, stop(tf.reshape(share, [-1, columns])), name=STEPS)
        t += tf.reshape(steps, tf.shape(value), name=SHAPED)
    return tf.identity(tf.cast(y + (t - stop(t)), x.dtype), name=name)


def _columns(x: Node) -> int | None:
    """The columns of the matrix that a tensor is summed as: its last axis, with the one before where that is short.

    None where their length isn't known before it runs.
    """
    sizes = [] if x.shape.rank is None else x.shape.as_list()[1:]
    found = None
    for size in reversed(sizes[-2:]):
        if size is None or (found is not None and found >= COLUMNS):
            break
        found = size * (found or 1)
    return found or None


def _largest_kept(scale: Node, codes: Node) -> Node:
    """The largest float32 whose quotient by a scale rounds to a code or less, halves to even.

    It lies within two steps of (code + ½) · scale: the product is rounded, and so is the quotient.

    Args:
        scale: a scalar.
        codes: any number of them, in a vector.
    """
    infinity = tf.fill([], np.float32(np.inf))
    quotients = codes + 0.5
    odd = tf.not_equal(tf.math.floormod(codes, 2.0), 0.0)
    quotients = tf.raw_ops.Select(condition=odd, x=tf.math.nextafter(quotients, -infinity), y=quotients)
    above = [quotients * scale]
    below = [tf.math.nextafter(above[0], -infinity)]
    for steps, end in ((above, infinity), (below, -infinity)):
        while len(steps) < 3:
            steps.append(tf.math.nextafter(steps[-1], end))
    found = below[-1]
    for candidate in (*reversed(below[:-1]), *above):
        kept = tf.less_equal(candidate / scale, quotients)
        found = tf.raw_ops.Select(condition=kept, x=candidate, y=found)
    return tf.maximum(tf.minimum(found, np.finfo(np.float32).max), np.finfo(np.float32).min)
