"""Scale and zero point of the grid that covers a range: one arithmetic for numpy and for every framework.

Calibration computes grids in numpy; in training, those of weights are computed on the device, step by step. Both must
agree to the bit, so both run these lines, in float64 from the range on.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from bitwright.grids._gradients import Array, Namespace, NumpyNamespace
from bitwright.grids._grid import FloatFormat, Grid, largest_of

EPSILON = float(np.finfo(np.float32).eps)


class RangeNamespace(Namespace, Protocol):
    """What grids of ranges need of a framework beside `gradients.Namespace`."""

    def lowest(self, x: Array, axes: tuple[int, ...], /) -> Array:
        """The minimum over these axes, which go."""

    def highest(self, x: Array, axes: tuple[int, ...], /) -> Array:
        """The maximum over these axes, which go."""

    def minimum(self, x: Array, y: Array | float, /) -> Array:
        """The smaller of two; the second may be a number."""

    def maximum(self, x: Array, y: Array | float, /) -> Array:
        """The larger of two; the second may be a number."""

    def divided(self, x: Array, by: float, /) -> Array:
        """x / by, correctly rounded: no compiler may multiply by the reciprocal instead."""

    def filled(self, x: Array, value: float, /) -> Array:
        """An array of x's shape and type that holds one value."""

    def float64(self, x: Array, /) -> Array:
        """x as float64."""

    def float32(self, x: Array, /) -> Array:
        """x as float32."""


class NumpyRanges(NumpyNamespace):
    """`RangeNamespace` of numpy."""

    minimum = staticmethod(np.minimum)
    maximum = staticmethod(np.maximum)
    divided = staticmethod(np.divide)
    filled = staticmethod(np.full_like)
    float64 = staticmethod(np.float64)

    @staticmethod
    def lowest(x: Array, axes: tuple[int, ...], /) -> Array:
        """Minimum over axes."""
        return np.min(x, axis=axes)

    @staticmethod
    def highest(x: Array, axes: tuple[int, ...], /) -> Array:
        """Maximum over axes."""
        return np.max(x, axis=axes)

    @staticmethod
    def float32(x: Array, /) -> Array:
        """x as float32."""
        return np.asarray(x, np.float32)

    # -- of `run_time.RunTimeNamespace`

    @staticmethod
    def spans(x: Array, per_token: bool, /) -> tuple[Array, Array]:
        """Minimum and maximum of rows, or of all values."""
        axis = -1 if per_token else None
        return np.min(x, axis=axis, keepdims=per_token), np.max(x, axis=axis, keepdims=per_token)

    @staticmethod
    def stop(x: Array, /) -> Array:
        """x: numpy has no gradients."""
        return x


NUMPY = NumpyRanges()


class GridKind(NamedTuple):
    """A grid without its numbers.

    Attributes:
        bits, signed, symmetric, strict, float_format: as in `QuantSpec`.
        one_sided: a symmetric grid from 0 on, stored unsigned, for ranges without negative values.
    """

    bits: int
    signed: bool
    symmetric: bool
    strict: bool
    float_format: FloatFormat | None
    one_sided: bool


def range_numbers(ns: RangeNamespace, low: Array, high: Array, kind: GridKind) -> tuple[Array, Array]:
    """The scale (float32) and the zero point (float64, whole) of the grid that covers a range.

    Formulas (n = number of steps): asymmetric δ = (high − low)/n, z = round(−low/δ) + qmin;
    symmetric δ = max(high/qmax, −low/−qmin), so that a tensor whose extreme is negative gets the extra code;
    a symmetric grid stored unsigned has z = 2**(bits−1), a one-sided one δ = high/n and z = 0. Floats below 16 bits are
    scaled so that the larger end is their largest value. Ranges that are empty give δ = 2**-23 (float32 epsilon).

    Args:
        ns: the framework's functions.
        low, high: float64 of one shape, low ≤ 0 ≤ high.
        kind: of grid.
    """
    if kind.float_format is not None:
        scale = ns.filled(high, 1.0)
        if not kind.float_format.endswith("float16"):
            extreme = ns.maximum(-low, high)
            scale = ns.maximum(ns.divided(extreme, largest_of(kind.float_format)), EPSILON)
        return ns.float32(scale), ns.filled(high, 0.0)
    grid, half = Grid.of(kind.bits, signed=kind.signed, strict=kind.strict), 2 ** (kind.bits - 1)
    zero = ns.filled(high, 0.0)
    if kind.one_sided:
        scale = ns.divided(high, grid.steps)
    elif kind.symmetric:
        scale = ns.maximum(ns.divided(high, half - 1), ns.divided(-low, half - int(kind.strict)))
        zero = ns.filled(high, 0.0 if kind.signed else float(half))
    else:
        scale = ns.divided(high - low, grid.steps)
    # The floor keeps all-zero channels (they exist in trained nets) from dividing by zero.
    scale = ns.float32(ns.maximum(scale, min(EPSILON, 0.01 / grid.steps)))
    if not kind.symmetric:
        zero = ns.round(-low / ns.float64(scale)) + float(grid.qmin)
        zero = ns.minimum(ns.maximum(zero, float(grid.qmin)), float(grid.qmax))
    return scale, zero


def two_level_factors(ns: RangeNamespace, scale: Array, channels: int, ratio: int) -> tuple[Array, Array]:
    """Block scales as whole multiples of one float scale a channel (low-power blockwise quantization).

    γ = max over the channel's blocks / ratio, k = clip(round(scale/γ), 1, ratio); the blocks' scales become k·γ.

    Args:
        ns: the framework's functions.
        scale: float32, (channels, blocks).
        channels: how many.
        ratio: 2**(decompressed width − code width).

    Returns:
        k, float32 (channels, blocks), and γ, float32 (channels, 1).
    """
    gamma: Any = ns.float32(ns.reshape(ns.highest(scale, (1,)), (channels, 1)) / float(ratio))
    return ns.minimum(ns.maximum(ns.round(scale / gamma), 1.0), float(ratio)), gamma
