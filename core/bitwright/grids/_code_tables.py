"""Grids that are a table of values: the numbers of four-bit formats, which no framework has a cast for.

One arithmetic for numpy and every framework: comparisons with thresholds, and selections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any
"""An array of whichever framework the namespace belongs to."""


class Choosing(Protocol):
    """What tables need of a framework; `bitwright.grids._range_numbers.RangeNamespace` has it."""

    def minimum(self, x: Array, y: float, /) -> Array:
        """The smaller of two."""

    def maximum(self, x: Array, y: float, /) -> Array:
        """The larger of two."""

    def where(self, mask: Array, x: Array, y: Array, /) -> Array:
        """x where the mask is true, else y."""


@dataclass(frozen=True, slots=True)
class CodeTable:
    """The values that a code stands for, before the scale.

    Attributes:
        values: ascending, exact in float32; the first and the last saturate.
        above: a value is the nearest to what exceeds the threshold before it. The largest float32 numbers that aren't
            nearer to the next value: midpoints, or the number before where a tie goes up.
    """

    values: tuple[float, ...]
    above: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(-self.values[0], self.values[-1])

    @classmethod
    def of(cls, values: NDArray[np.float64], up: NDArray[np.bool_]) -> CodeTable:
        """The table of ascending values; `up`: which ties with the next value go to that one."""
        middles = (values[:-1] + values[1:]) / 2  # of float32 numbers: exact in float64
        single = middles.astype(np.float32)
        past = (single > middles) | ((single == middles) & up)
        single = np.where(past, np.nextafter(single, np.float32(-np.inf)), single)
        return cls(tuple(values.tolist()), tuple(single.tolist()))

    def rounded(self, ns: Choosing, x: Array) -> Array:
        """The nearest values; NaN stays NaN.

        Args:
            ns: the framework's functions.
            x: float32, already divided by the scale.
        """
        held = ns.minimum(ns.maximum(x, self.values[0]), self.values[-1])
        y = held - held + self.values[0]
        for threshold, value in zip(self.above, self.values[1:], strict=True):
            y = ns.where(held > threshold, value, y)
        return y


def _of_float(exponent_bits: int, mantissa_bits: int) -> CodeTable:
    """All finite numbers of a float format without infinities and NaN; ties to the even significand."""
    codes = np.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
    normal = np.minimum(exponent, 1)
    powers = np.maximum(exponent, 1) - (2 ** (exponent_bits - 1) - 1)
    values = np.ldexp(normal + mantissa / 2**mantissa_bits, powers)
    to_next = codes[:-1] % 2 == 1
    return CodeTable.of(np.concatenate([-values[:0:-1], values]), np.concatenate([~to_next[::-1], to_next]))


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, with an exact 0 (Dettmers et al. 2023, QLoRA, appendix E)."""

CODE_TABLES: dict[str, CodeTable] = {
    "float4e2m1": _of_float(2, 1),  # 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: OCP Microscaling v1.0, §5.3.3
    "nf4": CodeTable.of(np.array(_NF4), np.zeros(len(_NF4) - 1, bool)),
}
"""Tables by the name of their format."""
KEPT_AS: dict[str, str] = {"float4e2m1": "float8e4m3fn"}
"""A float format that has all values of a table, for runtimes without the table's own type."""
