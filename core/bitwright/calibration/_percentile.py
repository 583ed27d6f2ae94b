"""Percentile: a fixed share of the values may lie outside the grid."""

from __future__ import annotations

import numpy as np

from bitwright.calibration._base import Scheme
from bitwright.calibration._density import Density, Rows
from bitwright.errors import InputError
from bitwright.grids import QuantSpec


class Percentile(Scheme):
    """Cuts off the largest and the smallest (100 − p) % of the values.

    The upper end is the smallest value that at least p % of the values don't exceed (for a histogram, the near edge
    of its bin); the lower end mirrors it. p = 100 is min-max. A group that would be left without a range (nearly all
    of it zeros) keeps its extremes.

    Args:
        setting: p, 50 to 100; default 99.99.
    """

    name = "percentile"
    view = 14

    def __init__(self, setting: str | None = None) -> None:
        try:
            self.percentile = 99.99 if setting is None else float(setting)
        except ValueError:
            raise InputError(f"percentile:{setting}: write a number, for example percentile:99.9") from None
        if not 50 <= self.percentile <= 100:
            raise InputError(f"percentile:{setting}: a percentile lies between 50 and 100, for example 99.9")

    def range(self, data: Density, spec: QuantSpec) -> tuple[Rows, Rows]:
        """The percentile of each side."""
        high = self._upper(data.low, data.mass)
        low = -self._upper(-data.high[:, ::-1], data.mass[:, ::-1])
        empty = (low >= 0) & (high <= 0)
        return np.where(empty, data.minimum, np.minimum(low, high)), np.where(empty, data.maximum, high)

    def _extremes(self, spec: QuantSpec) -> bool:
        return self.percentile == 100 or super()._extremes(spec)

    def _upper(self, edges: Rows, mass: Rows) -> Rows:
        below = np.cumsum(mass, axis=1)
        # The slack keeps a share that is met exactly from being missed by rounding.
        wanted = self.percentile / 100 * below[:, -1:] * (1 - 1e-12)
        at = np.minimum((below < wanted).sum(axis=1), edges.shape[1] - 1)
        return np.asarray(edges[np.arange(len(edges)), at])
