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

import threading
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
CHUNK = 2**15
"""Values counted at a time: scratch (12 bytes each) stays in the second-level cache, beside the counters."""
MANY = 2**13
"""Values of a channel from which it pays to have a counter for every bin there might be, see `_Counters`."""
ALL_BINS = 2**19
"""Counters of every bin there might be are held up to so many (2 MiB): up to 10 bits of mantissa."""
_COUNTERS = (np.uint16, np.uint32, np.int64)
"""Types of counters, the smallest that does: histograms of all tensors of a network are in memory at a time."""
_ABSENT = -(1 << 60)
"""In place of the shift of an octave that has no bins."""


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


class _Counters:
    """A counter for every bin of a precision, from which a statistic takes what it counted of a batch.

    A value's own bits say which, without a look at where a statistic holds that octave; and those of the octaves that
    occur are the same few from tensor to tensor, which stay in the cache as no statistic's own do.

    Args:
        precision: mantissa bits.

    Attributes:
        bins: (octaves, bins of an octave), uint32; whoever reads them sets them to zero.
    """

    def __init__(self, precision: int) -> None:
        self.bins = np.zeros((1 << (1 + EXPONENTS), 1 << precision), np.uint32)
        self._index = np.empty(CHUNK, np.intp)
        self._shift = MANTISSA - precision

    def count(self, row: NDArray[np.float32]) -> None:
        """Count values, fewer than 2**32 and finite."""
        patterns, flat, one = row.view(np.uint32), self.bins.ravel(), np.uint32(1)
        for start in range(0, len(row), CHUNK):
            part = patterns[start : start + CHUNK]
            index = self._index[: len(part)]
            np.right_shift(part, self._shift, out=index, casting="unsafe")
            np.add.at(flat, index, one)

    def occupied(self, low: np.float32, high: np.float32) -> NDArray[np.intp]:
        """Octaves that have been counted into, of values between these two."""
        sign = 1 << EXPONENTS
        found = []
        for first, farthest in ((0, high), (sign, -low)):
            last = int(np.maximum(farthest, np.float32(0)).view(np.uint32)) >> MANTISSA
            found.append(first + np.flatnonzero(self.bins[first : first + last + 1].any(axis=1)))
        return np.concatenate(found)


_LOCAL = threading.local()
"""`counters`: those of this thread, by precision, all zero."""


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
        self._clear(1 if axis is None else 0)

    def _clear(self, channels: int) -> None:
        """No counts, and room for none: few octaves occur, and only those get bins."""
        self._octaves: list[int] = []
        """Sign and exponent of the bins held, in the order in which values of theirs came."""
        self._shift = np.full(1 << (1 + EXPONENTS), _ABSENT, np.intp)
        """For each octave, from a code to its column."""
        self._table: NDArray[Any] = np.zeros((channels, 0), _COUNTERS[0])
        self._most = 0
        """No count is larger."""

    @staticmethod
    def bytes_for(channels: int = 1, precision: int = 9) -> int:
        """Memory that it holds at most where values span 24 octaves of either sign."""
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
        low, high = lows, highs = rows.min(axis=1), rows.max(axis=1)
        for pair in pairs:
            low, high = np.minimum(low, pair[0]), np.maximum(high, pair[1])
        require_finite(low, high)
        self._open(len(rows))
        self._expect(rows.shape[1])
        for channel, row in enumerate(rows):
            self._add(row, channel, lows[channel], highs[channel])
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    def _add(self, row: NDArray[np.float32], channel: int, low: np.float32, high: np.float32) -> None:
        if not MANY <= len(row) < 2**32 or 1 << (1 + EXPONENTS + self.precision) > ALL_BINS:
            self._add_few(row, channel)
            return
        own: dict[int, _Counters] = _LOCAL.__dict__.setdefault("counters", {})
        counters = own.pop(self.precision, None) or _Counters(self.precision)
        counters.count(row)
        known = np.array(self._octaves, np.intp)
        counts = counters.bins[known]
        if int(counts.sum()) != len(row):
            self._hold(counters.occupied(low, high))
            known = np.array(self._octaves, np.intp)
            counts = counters.bins[known]
        mine = self._table[channel]
        np.add(mine, counts.ravel(), out=mine, casting="unsafe")  # `_expect` has made them wide enough
        counters.bins[known] = 0
        own[self.precision] = counters  # not before they are zero, whatever comes in between

    def _add_few(self, row: NDArray[np.float32], channel: int) -> None:
        """Straight into the bins that are held: what it takes grows with the values alone."""
        patterns = row.view(np.uint32)
        size = min(CHUNK, len(row))
        codes, index = np.empty(size, np.uint32), np.empty(size, np.intp)
        one = self._table.dtype.type(1)
        for start in range(0, len(row), size):
            part = patterns[start : start + size]
            n = len(part)
            np.right_shift(part, MANTISSA, out=codes[:n])
            self._shift.take(codes[:n], out=index[:n], mode="clip")  # the default mode copies
            if index[:n].min() <= _ABSENT:
                self._hold(np.flatnonzero(np.bincount(codes[:n])))  # a fifth of np.unique's time
                self._shift.take(codes[:n], out=index[:n], mode="clip")
            np.right_shift(part, MANTISSA - self.precision, out=codes[:n])
            index[:n] += codes[:n]
            # As fast as bincount, and the cost of a small tensor doesn't grow with the number of bins.
            np.add.at(self._table[channel], index[:n], one)

    def _open(self, channels: int) -> None:
        if self._table.shape[0] == 0:
            self._clear(channels)
            self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)
        elif len(self._table) != channels:
            raise InputError(f"{channels} channels after batches with {len(self._table)}")

    def _hold(self, octaves: NDArray[Any]) -> None:
        """Make bins for octaves."""
        fresh = [int(o) for o in octaves if self._shift[o] <= _ABSENT]
        if not fresh:
            return
        for octave in fresh:
            self._shift[octave] = (len(self._octaves) - octave) << self.precision
            self._octaves.append(octave)
        room = np.zeros((len(self._table), len(fresh) << self.precision), self._table.dtype)
        self._table = np.concatenate([self._table, room], axis=1)

    def _expect(self, values: int) -> None:
        """Widen the counters if so many more values of a channel could overflow one."""
        self._most += values
        dtype = next(d for d in _COUNTERS if self._most <= np.iinfo(d).max)
        if np.iinfo(dtype).max > np.iinfo(self._table.dtype).max:
            self._table = self._table.astype(dtype)

    def _occupied(self, precision: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Codes in ascending order, at fewer bits of mantissa, of bins that hold a value; counts (channels, codes)."""
        octaves = np.array(self._octaves, np.int64)
        order = np.argsort(octaves)
        channels, bins = len(self._table), len(order) << precision
        table = self._table.reshape(channels, len(order), 1 << self.precision)[:, order]
        table = table.reshape(channels, bins, 1 << (self.precision - precision))
        codes = (octaves[order][:, None] << precision | np.arange(1 << precision)).ravel()
        busy = np.flatnonzero(table.any(axis=(0, 2)))
        return codes[busy], table[:, busy].sum(axis=2, dtype=np.int64)

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
        self._expect(other._most)
        self._count(*other._occupied(other.precision))
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)

    def _count(self, codes: NDArray[Any], counts: NDArray[Any]) -> None:
        octaves = codes >> self.precision
        self._hold(np.unique(octaves))
        self._table[:, self._shift[octaves] + codes] += counts.astype(self._table.dtype)

    def state(self) -> dict[str, NDArray[Any]]:
        """Plain arrays: only the occupied bins."""
        codes, counts = self._occupied(self.precision)
        return {
            "precision": np.array(self.precision),
            "low": self.low,
            "high": self.high,
            "codes": codes,
            "counts": counts,
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take a saved state."""
        self.precision = int(state["precision"])
        self.low, self.high = np.array(state["low"], np.float64), np.array(state["high"], np.float64)
        counts = np.asarray(state["counts"], np.int64)
        self._clear(len(counts))
        self._expect(int(counts.sum(axis=1).max(initial=0)))
        self._count(np.asarray(state["codes"], np.int64), counts)

    @property
    def total(self) -> NDArray[np.int64]:
        """Values counted, (channels,) or (1,)."""
        return np.asarray(self._table.sum(axis=1, dtype=np.int64))

    @property
    def seen(self) -> bool:
        """Whether any value was taken."""
        return len(self._table) > 0 and bool((self.low <= self.high).all())

    def bins(self, precision: int | None = None) -> Bins:
        """The occupied bins, joined to fewer mantissa bits if asked."""
        kept = min(self.precision, precision or self.precision)
        busy, counts = self._occupied(kept)
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
