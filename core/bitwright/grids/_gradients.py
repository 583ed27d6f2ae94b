"""Gradients of fake quantization, once for all frameworks: a forward pass and its vector-Jacobian product.

The forward pass is the grid of `bitwright.grids._grid`; rounding is passed straight through (Bengio et al. 2013). With
r = x/s, q = round(r), and the codes' ends seen from zero, lo = qmin − z and hi = qmax − z::

    y      = clip(q, lo, hi) · s
    ∂x     = g                                inside, 0 outside            (inside: lo ≤ q ≤ hi)
    ∂s     = Σ g · (q − r  inside, lo or hi outside)
    ∂z     = Σ −g · s                         outside only

(Esser et al. 2020, eq. 3; Bhalgat et al. 2020, eq. 4–5.) Arrays are touched by operators and by the six functions of
a `Namespace` only, so an adapter for a framework is six one-liners.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.grids._grid import Granularity, Grid, PerChannel, PerTensor, axis_of, block_count, fixed_layout

Array = Any
"""An array of whichever framework the namespace belongs to."""


class Namespace(Protocol):
    """What fake quantization needs of a framework beside arithmetic and comparison operators."""

    def round(self, x: Array, /) -> Array:
        """To the nearest integer, halves to even."""

    def clip(self, x: Array, low: Array, high: Array, /) -> Array:
        """Between two broadcast arrays."""

    def where(self, mask: Array, x: Array, y: Array, /) -> Array:
        """x where the mask is true, else y; either may be a Python number."""

    def sum(self, x: Array, axes: tuple[int, ...], /) -> Array:
        """Over these axes, which go."""

    def reshape(self, x: Array, shape: tuple[int, ...], /) -> Array:
        """The same elements in another shape."""

    def transpose(self, x: Array, axes: tuple[int, ...], /) -> Array:
        """Axes in another order."""


class NumpyNamespace:
    """`Namespace` of numpy: the reference that adapters are checked against."""

    round = staticmethod(np.rint)
    clip = staticmethod(np.clip)
    where = staticmethod(np.where)
    transpose = staticmethod(np.transpose)

    @staticmethod
    def reshape(x: NDArray[Any], shape: tuple[int, ...], /) -> NDArray[Any]:
        """The same elements in another shape."""
        return np.reshape(x, shape)

    @staticmethod
    def sum(x: NDArray[Any], axes: tuple[int, ...], /) -> NDArray[Any]:
        """Sum over axes."""
        return np.asarray(x.sum(axis=axes))


@dataclass(frozen=True, slots=True)
class Groups:
    """How a tensor's elements share scales, as shapes: blocks become an axis of their own, the rest broadcasts.

    Attributes:
        shape: of the tensor.
        split: the tensor's shape with its block axis cut into (blocks, block size).
        scale: of the scale array, as encodings hold it.
        spread: of the scale array, ready to broadcast against `split`.
        axes: of `split`, over which elements share a scale.
        swapped: the blocks' axis lies before the channels'.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    scale: tuple[int, ...]
    spread: tuple[int, ...]
    axes: tuple[int, ...]
    swapped: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], granularity: Granularity) -> Groups:
        """The groups of a tensor.

        Raises:
            InputError: an axis is out of range, or the block size doesn't divide its axis.
        """
        rank, granularity = len(shape), fixed_layout(granularity)
        if isinstance(granularity, PerTensor):
            return cls(shape, shape, (), (), tuple(range(rank)))
        axis = axis_of(granularity.axis, shape)
        if isinstance(granularity, PerChannel):
            spread = tuple(n if i == axis else 1 for i, n in enumerate(shape))
            return cls(shape, shape, (shape[axis],), spread, tuple(i for i in range(rank) if i != axis))
        along = axis_of(granularity.block_axis, shape)
        blocks = block_count(shape, granularity)
        split = (*shape[:along], blocks, granularity.block_size, *shape[along + 1 :])
        channel = axis + int(axis > along)
        kept = (channel, along)
        spread = tuple(n if i in kept else 1 for i, n in enumerate(split))
        axes = tuple(i for i in range(len(split)) if i not in kept)
        return cls(shape, split, (shape[axis], blocks), spread, axes, along < axis)

    @property
    def elements(self) -> int:
        """How many share one scale."""
        return math.prod(self.split[i] for i in self.axes)

    def cut(self, ns: Namespace, x: Array) -> Array:
        """A tensor in the shape `split`."""
        return x if self.split == self.shape else ns.reshape(x, self.split)

    def joined(self, ns: Namespace, x: Array) -> Array:
        """The inverse of `cut`."""
        return x if self.split == self.shape else ns.reshape(x, self.shape)

    def broadcast(self, ns: Namespace, values: Array) -> Array:
        """Values of the scale's shape, made to broadcast against `split`."""
        if not self.scale:
            return values
        return ns.reshape(ns.transpose(values, (1, 0)) if self.swapped else values, self.spread)

    def reduce(self, ns: Namespace, x: Array) -> Array:
        """The sum over each group, in the scale's shape; the transpose of `broadcast`."""
        summed = ns.sum(x, self.axes) if self.axes else x
        return ns.transpose(summed, (1, 0)) if self.swapped else summed


class Gradients(NamedTuple):
    """What flows back: to the tensor, its scales and its zero points; None where it wasn't wanted."""

    x: Array
    scale: Array | None
    zero_point: Array | None


def fake_quantize(ns: Namespace, x: Array, scale: Array, zero_point: Array, grid: Grid, groups: Groups) -> Array:
    """Round a tensor to an integer grid and back; bit-equal to `grid.fake_quantize`, midpoints included.

    Args:
        ns: the framework's functions.
        x: float32 tensor (float64 for checks).
        scale, zero_point: of x's type, in the scale's shape; the zero point holds integers.
        grid: the codes, of at most 24 bits.
        groups: which elements share a scale.
    """
    s, low, high = _numbers(ns, scale, zero_point, grid, groups)
    return groups.joined(ns, rounded(ns, groups.cut(ns, x), s, low, high))


def fake_quantize_vjp(
    ns: Namespace,
    g: Array,
    x: Array,
    scale: Array,
    zero_point: Array,
    grid: Grid,
    groups: Groups,
    *,
    learned: bool = True,
) -> Gradients:
    """The vector-Jacobian product of `fake_quantize` at x.

    Args:
        g: gradient of the loss to the output.
        learned: scales and zero points want gradients too.
    """
    s, low, high = _numbers(ns, scale, zero_point, grid, groups)
    cotangent, value = groups.cut(ns, g), groups.cut(ns, x)
    if not learned:
        return Gradients(groups.joined(ns, rounded_vjp(ns, cotangent, value, s, low, high)), None, None)
    dx, ds, dz = learned_vjp(ns, cotangent, value, s, low, high)
    return Gradients(groups.joined(ns, dx), groups.reduce(ns, ds), groups.reduce(ns, dz))


def rounded(ns: Namespace, x: Array, scale: Array, low: Array, high: Array) -> Array:
    """clip(round(x / scale), low, high) · scale, all broadcast."""
    return ns.clip(ns.round(x / scale), low, high) * scale


def rounded_vjp(ns: Namespace, g: Array, x: Array, scale: Array, low: Array, high: Array) -> Array:
    """The gradient to x alone."""
    q = ns.round(x / scale)
    return ns.where((q >= low) & (q <= high), g, 0.0)


def learned_vjp(ns: Namespace, g: Array, x: Array, scale: Array, low: Array, high: Array) -> tuple[Array, Array, Array]:
    """Gradients to x, and each element's share of those to the scale and to the zero point."""
    r = x / scale
    q = ns.round(r)
    inside = (q >= low) & (q <= high)
    return (
        ns.where(inside, g, 0.0),
        g * (ns.clip(q, low, high) - ns.where(inside, r, 0.0)),
        ns.where(inside, 0.0, g) * -scale,
    )


def cast_vjp(
    ns: Namespace, g: Array, x: Array, y: Array, scale: Array, largest: float, groups: Groups, *, learned: bool = True
) -> Gradients:
    """The same for y = cast(x / s) · s to a float format that saturates at `largest`; it has no zero point."""
    s = groups.broadcast(ns, scale)
    cotangent, r = groups.cut(ns, g), groups.cut(ns, x) / s
    inside = (r >= -largest) & (r <= largest)
    dx = groups.joined(ns, ns.where(inside, cotangent, 0.0))
    if not learned:
        return Gradients(dx, None, None)
    ds = cotangent * (groups.cut(ns, y) / s - ns.where(inside, r, 0.0))
    return Gradients(dx, groups.reduce(ns, ds), None)


def lsq_factor(elements: int, grid: Grid) -> float:
    """1/√(N·Q): evens out the size of a scale's gradient and that of its tensor (Esser et al. 2020, §2.2).

    Args:
        elements: N, how many share the scale.
        grid: its largest code from zero is Q (2**(b−1) − 1 signed, 2**b − 1 unsigned).
    """
    return 1.0 / math.sqrt(max(elements, 1) * grid.qmax)


def _numbers(ns: Namespace, scale: Array, zero_point: Array, grid: Grid, groups: Groups) -> tuple[Array, Array, Array]:
    zero = groups.broadcast(ns, zero_point)
    return groups.broadcast(ns, scale), grid.qmin - zero, grid.qmax - zero
