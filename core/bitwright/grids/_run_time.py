"""Grids whose range is that of the values themselves, at run time: one arithmetic for numpy and every framework.

Per tensor and asymmetric it is ONNX's DynamicQuantizeLinear (operator specification, opset 11), as ONNX Runtime
computes it; all else is the same for each token, for other widths, and symmetric::

    asymmetric (unsigned codes)   s = (max(x, 0) − min(x, 0)) / (2**b − 1)    z = round(−min(x, 0) / s)
    symmetric (signed codes)      s = max |x| / (2**(b−1) − 1)                z = 0, codes −qmax … qmax
    x' = (clip(round(x / s) + z, qmin, qmax) − z) · s

in float32 and in this order, rounding half to even. Where all values are 0, or so small that s is no normal number,
s is 1 and they become zeros.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bitwright.grids._gradients import Array, rounded
from bitwright.grids._grid import RunTimeGrid
from bitwright.grids._range_numbers import RangeNamespace

TINY = float(np.finfo(np.float32).tiny)
"""The smallest scale: below lie numbers that some frameworks flush to zero."""


class RunTimeNamespace(RangeNamespace, Protocol):
    """What ranges at run time need of a framework beside `RangeNamespace`."""

    def spans(self, x: Array, per_token: bool, /) -> tuple[Array, Array]:
        """Minimum and maximum: over the last axis, which stays with length 1, or of all values, as scalars."""

    def stop(self, x: Array, /) -> Array:
        """x, without a gradient."""


def run_time_numbers(ns: RunTimeNamespace, x: Array, grid: RunTimeGrid) -> tuple[Array, Array]:
    """Scale and zero point of values, float32, ready to broadcast against them.

    Args:
        ns: the framework's functions.
        x: float32, with at least one value.
        grid: the codes, and whether each row of the last axis has numbers of its own.
    """
    low, high = ns.spans(x, grid.per_token)
    low, high = ns.minimum(low, 0.0), ns.maximum(high, 0.0)
    reach = ns.maximum(high, -low) if grid.symmetric else high - low
    scale = ns.divided(reach, float(grid.codes.qmax))
    scale = ns.where(scale < TINY, ns.filled(scale, 1.0), scale)
    if grid.symmetric:
        return scale, ns.filled(scale, 0.0)
    return scale, ns.minimum(ns.round(-low / scale), float(grid.codes.qmax))


def run_time_rounded(ns: RunTimeNamespace, x: Array, grid: RunTimeGrid, *, trained: bool = False) -> Array:
    """Values on the grid that they span.

    Args:
        ns, x, grid: see `run_time_numbers`.
        trained: with a gradient, passed straight through: no value lies beyond its own range.
    """
    scale, zero = run_time_numbers(ns, x, grid)
    y = rounded(ns, x, scale, grid.codes.qmin - zero, grid.codes.qmax - zero)
    return ns.stop(y) + (x - ns.stop(x)) if trained else y  # x − x is 0: the value is y to the bit
