"""A histogram that needs no range beforehand, keeps every count exactly and merges without loss, in any order.

Bins are the float32 numbers that agree in sign, exponent and the first `precision` bits of the mantissa: equal
widths inside an octave, doubling from one to the next (the layout of HdrHistogram). A value's bin is its own bit
pattern, shifted, so that

- counting costs a shift, a cast and an indexed add, with no arithmetic that could round a value into the wrong bin;
- the bins are the same for every range: a growing range opens further octaves and moves no count, merging is
  addition, and one huge outlier takes nothing from the resolution of the body;
- coarser views (fewer bits, or a linear histogram with a power-of-two step) join whole bins;
- zero, which rectified tensors are full of, has a bin of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Reduction
from bitwright.errors import InputError
from bitwright.statistics._base import by_channel, require_finite

MANTISSA = 23
EXPONENTS = 8
CHUNK = 2**16
"""Values counted at a time: scratch (8 bytes each) stays in the second-level cache."""


@dataclass(frozen=True)
class Bins:
    """Occupied bins in ascending order.

    Attributes:
        low, high: edges, float64 (rows, bins); within the exact extremes of each row; equal for single values.
        count: (rows, bins), float64 (exact up to 2**53).
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    count: NDArray[np.float64]


class HistogramStatistic:
    """Counts of a tensor's values, for the whole tensor or for each channel; values are taken as float32.

    Magnitudes below 2**-126 (float32 subnormals) count as zero.

    Args:
        axis: channel axis; None for one histogram.
        precision: mantissa bits, 1 to 14: the width of a bin is at most 2**-precision of its values.
            Default 9 for one histogram (512 bins an octave), 7 for each channel.
        step: count every `step`-th value of each sample only (see `Tap.step`); extremes are those of the values seen.
        layout: channel axis by which these are counted, of one histogram.
        extremes: updates also bring the extremes of all values, reduced in the graph, for a histogram of some.

    Attributes:
        low, high: exact extremes, float64 (channels,) or (1,); +inf and −inf before the first update.
    """

    reduction: Reduction = "none"

    def __init__(
        self,
        axis: int | None = None,
        *,
        precision: int | None = None,
        step: int = 1,
        layout: int | None = None,
        extremes: bool = False,
    ) -> None:
        precision = (9 if axis is None else 7) if precision is None else precision
        if not 1 <= precision <= 14:
            raise InputError(f"precision={precision}: a histogram has 1 to 14 bits of mantissa")
        self.axis, self.precision, self.step, self.layout, self.extremes = axis, precision, step, layout, extremes
        self.low = np.full(1, np.inf)
        self.high = np.full(1, -np.inf)
        # Zeroed memory is mapped page by page as counts arrive: an octave is a page or less, few octaves occur.
        self._table: NDArray[np.int64] = np.zeros((1 if axis is None else 0, self._codes), np.int64)

    @property
    def _codes(self) -> int:
        return 1 << (1 + EXPONENTS + self.precision)

    @staticmethod
    def bytes_for(channels: int = 1, precision: int = 9) -> int:
        """Memory that it typically holds: 24 octaves of either sign."""
        return channels * 2 * 24 * 8 << precision

    def update(self, *values: NDArray[Any]) -> None:
        """Take one batch: its values, and with `extremes` the pair (lowest, highest) of all that the batch has.

        Raises:
            InputError: NaN or infinite values, or another number of channels; nothing is taken then.
        """
        value, *pairs = values
        tensor = np.asarray(value)
        if tensor.size == 0:
            return
        rows = np.ascontiguousarray(
            tensor.reshape(1, -1) if self.axis is None else by_channel(tensor, self.axis), np.float32
        )
        low, high = rows.min(axis=1), rows.max(axis=1)
        for pair in pairs:
            low, high = np.minimum(low, pair[0]), np.maximum(high, pair[1])
        require_finite(low, high)
        self._open(len(rows))
        for row, counts in zip(rows, self._table, strict=True):
            self._add(row, counts)
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    def _add(self, row: NDArray[np.float32], counts: NDArray[np.int64]) -> None:
        patterns = row.view(np.uint32)
        size = min(CHUNK, len(row))
        codes, index = np.empty(size, np.uint32), np.empty(size, np.intp)
        for start in range(0, len(row), size):
            part = patterns[start : start + size]
            n = len(part)
            np.right_shift(part, MANTISSA - self.precision, out=codes[:n])
            index[:n] = codes[:n]
            # As fast as bincount, and the cost of a small tensor doesn't grow with the number of bins.
            np.add.at(counts, index[:n], 1)

    def _open(self, channels: int) -> None:
        if self._table.shape[0] == 0:
            self._table = np.zeros((channels, self._codes), np.int64)
            self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)
        elif len(self._table) != channels:
            raise InputError(f"{channels} channels after batches with {len(self._table)}")

    def merge(self, other: Self) -> None:
        """Add what another instance has seen.

        Raises:
            InputError: the other has another precision or number of channels.
        """
        if other.precision != self.precision:
            raise InputError(f"can't merge a histogram of precision {other.precision} into one of {self.precision}")
        if len(other._table) == 0:
            return
        self._open(len(other._table))
        used = other._table.any(axis=0)
        self._table[:, used] += other._table[:, used]
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)

    def state(self) -> dict[str, NDArray[Any]]:
        """Plain arrays: only the occupied bins."""
        used = np.flatnonzero(self._table.any(axis=0)) if len(self._table) else np.zeros(0, np.intp)
        return {
            "precision": np.array(self.precision),
            "low": self.low,
            "high": self.high,
            "codes": used,
            "counts": self._table[:, used],
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take a saved state."""
        self.precision = int(state["precision"])
        self.low, self.high = np.array(state["low"], np.float64), np.array(state["high"], np.float64)
        self._table = np.zeros((len(state["counts"]), self._codes), np.int64)
        self._table[:, state["codes"]] = state["counts"]

    @property
    def total(self) -> NDArray[np.int64]:
        """Values counted, (channels,) or (1,)."""
        return np.asarray(self._table.sum(axis=1), np.int64)

    @property
    def seen(self) -> bool:
        """Whether any value was taken."""
        return len(self._table) > 0 and bool((self.low <= self.high).all())

    def bins(self, precision: int | None = None) -> Bins:
        """The occupied bins, joined to fewer mantissa bits if asked."""
        kept = min(self.precision, precision or self.precision)
        table = self._table
        if kept < self.precision:
            joined = table.reshape(len(table), -1, 1 << (self.precision - kept))
            busy = np.flatnonzero(joined.any(axis=(0, 2)))
            counts = joined[:, busy].sum(axis=2)
        else:
            busy = np.flatnonzero(table.any(axis=0))
            counts = table[:, busy]
        sign = 1 << (EXPONENTS + kept)
        # Ascending values: negative codes fall, positive ones rise.
        order = np.argsort(np.where(busy >= sign, -(busy - sign) - 1, busy), kind="stable")
        busy, counts = busy[order], counts[:, order]
        near = ((busy % sign).astype(np.uint32) << np.uint32(MANTISSA - kept)).view(np.float32).astype(np.float64)
        far = (((busy % sign) + 1).astype(np.uint32) << np.uint32(MANTISSA - kept)).view(np.float32).astype(np.float64)
        subnormal = (busy % sign) < (1 << kept)
        near, far = np.where(subnormal, 0.0, near), np.where(subnormal, 0.0, far)
        negative = busy >= sign
        low, high = np.where(negative, -far, near), np.where(negative, -near, far)
        bounds = self.low[:, None], self.high[:, None]
        return Bins(np.clip(low, *bounds), np.clip(high, *bounds), counts.astype(np.float64))
