"""What a calibration scheme looks at: the distribution of each group of values that will share a scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.statistics import HistogramStatistic, RangeStatistic, Statistic

Rows = NDArray[np.float64]

EXACT_LIMIT = 2**22
"""Groups of more values than this are looked at through a histogram."""

SEARCH_PRECISION = 7
"""Mantissa bits of the bins that a search goes through: 128 bins an octave."""


@dataclass(frozen=True)
class Density:
    """One distribution a row: masses spread evenly over disjoint ascending intervals, or points where low == high.

    Attributes:
        minimum, maximum: exact extremes, (rows,).
        low, high: interval edges, (rows, intervals); no intervals where only the extremes are known.
        mass: weight of each interval, (rows, intervals).
    """

    minimum: Rows
    maximum: Rows
    low: Rows
    high: Rows
    mass: Rows

    @classmethod
    def of_statistic(cls, statistic: Statistic, precision: int = SEARCH_PRECISION) -> Self:
        """The distribution that a range or histogram has seen.

        Raises:
            EncodingError: it has seen nothing, or is another kind of statistic.
        """
        if not isinstance(statistic, RangeStatistic | HistogramStatistic):
            raise EncodingError(f"ranges can't be set from a {type(statistic).__name__}; use a range or a histogram")
        if not statistic.seen:
            raise EncodingError("no calibration data reached this tensor; check that the data set isn't empty")
        low, high = np.atleast_1d(statistic.low), np.atleast_1d(statistic.high)
        if isinstance(statistic, RangeStatistic):
            none = np.zeros((len(low), 0))
            return cls(low, high, none, none, none)
        bins = statistic.bins(precision)
        return cls(low, high, bins.low, bins.high, bins.count)

    @classmethod
    def of_values(cls, rows: NDArray[np.floating], precision: int = SEARCH_PRECISION) -> Self:
        """The distribution of given values, (rows, values): each a point, exactly, where memory allows."""
        if rows.shape[1] > EXACT_LIMIT:
            statistic = HistogramStatistic(0, precision=precision)
            statistic.update(rows)
            return cls.of_statistic(statistic, precision)
        points = np.sort(rows.astype(np.float64), axis=1)
        return cls(points[:, 0], points[:, -1], points, points, np.ones(points.shape))

    @classmethod
    def of_range(cls, rows: NDArray[np.floating]) -> Self:
        """The extremes of given values, (rows, values)."""
        none = np.zeros((len(rows), 0))
        return cls(rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64), none, none, none)

    @property
    def exact(self) -> bool:
        """Whether every interval is a point."""
        return self.low is self.high

    @property
    def magnitude(self) -> Rows:
        """Midpoints without sign, (rows, intervals)."""
        return np.abs(self.low if self.exact else 0.5 * (self.low + self.high))

    def rows(self, part: slice) -> Self:
        """Some of the rows."""
        low = self.low[part]
        high = low if self.exact else self.high[part]
        return replace(
            self, minimum=self.minimum[part], maximum=self.maximum[part], low=low, high=high, mass=self.mass[part]
        )

    def weighted(self, mass: Rows) -> Self:
        """The same intervals with other masses."""
        return replace(self, mass=mass)

    def body(self, outlying: float) -> Rows:
        """The magnitude that all but a share of the values that aren't zero keep within, (rows,); 0 if all are zero."""
        size = self.magnitude
        order = np.argsort(size, axis=1)
        ranked = np.take_along_axis(size, order, 1)
        below = np.cumsum(np.where(ranked > 0, np.take_along_axis(self.mass, order, 1), 0.0), axis=1)
        at = np.minimum((below < (1 - outlying) * below[:, -1:]).sum(axis=1), size.shape[1] - 1)
        return np.asarray(ranked[np.arange(len(size)), at])

    def condensed(self, smallest: float) -> Self:
        """Intervals whose magnitudes are all below `smallest` joined to one on each side of zero; points stay."""
        if self.exact:
            return self
        size = self.magnitude.max(axis=0)
        small = (size < smallest) & (size > 0)
        keep = [~small & (self.low.min(axis=0) < 0), small & (self.low.min(axis=0) < 0)]
        keep += [size == 0, small & ~keep[1], ~small & ~keep[0] & (size > 0)]
        parts = [self._joined(k) if k is keep[1] or k is keep[3] else self._picked(k) for k in keep if k.any()]
        low, high, mass = (np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True))
        return replace(self, low=low, high=high, mass=mass)

    def _picked(self, columns: NDArray[np.bool_]) -> tuple[Rows, Rows, Rows]:
        return self.low[:, columns], self.high[:, columns], self.mass[:, columns]

    def _joined(self, columns: NDArray[np.bool_]) -> tuple[Rows, Rows, Rows]:
        low, high, mass = self._picked(columns)
        return low[:, :1], high[:, -1:], mass.sum(axis=1, keepdims=True)
