"""SQNR ("tf-enhanced"): the least squared error, in which a rare huge value counts by its relative error."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from bitwright.calibration._base import Scheme
from bitwright.calibration._density import Density, Rows
from bitwright.calibration._search import FINE_BITS, least_squares_range
from bitwright.grids import QuantSpec

OUTLYING = 1e-3
"""Share of the non-zero values that the body may leave out."""

REACH = 2.0
"""A value is an outlier from this multiple of the body's largest magnitude on."""


class Sqnr(Scheme):
    """Minimizes E[(x − Q(x))² · min(1, (T/|x|)²)], T = 2 × the 99.9th percentile of the non-zero magnitudes.

    Up to T this is the plain squared error, and so the best signal-to-noise ratio. With the plain one everywhere, one
    value of 1000 among ten thousand from N(0, 1) would force a 4-bit grid that turns all others to zero, because
    saturating it costs 1000²; AIMET's weight of 3 on saturation makes that worse. Beyond T a value counts by its
    relative error: saturating it costs at most T² and is chosen where that saves the body more. Values beyond T that
    are not rare move the percentile, so T grows with them and they are kept.

    From `FINE_BITS` on nothing has to be given up for the body: it is min-max. Rare large values that are not outliers
    (probabilities, scores) can't be told by their distribution; placement gives their tensors another scheme, see
    `placement._known_ranges`.
    """

    name = "sqnr"
    extremes_from: ClassVar[int] = FINE_BITS

    def range(self, data: Density, spec: QuantSpec) -> tuple[Rows, Rows]:
        """The range of least cost."""
        return least_squares_range(relative_tails(data), spec)


class Scores(Sqnr):
    """`Sqnr` at the lower end; the upper end is the largest value.

    For scores that are compared with each other, by a softmax or an argmax: their largest values are what is read, and
    an error of δ there changes a probability by the factor exp(δ), while small ones hardly matter. On normal logits of
    5,000 classes the softmax behind them keeps 22.6 dB with the whole range at 8 bits, 14.9 dB with the range of least
    noise (18,710 classes: 20.9 and 10.6).
    """

    name = "scores"
    keeps_top: ClassVar[bool] = True

    def range(self, data: Density, spec: QuantSpec) -> tuple[Rows, Rows]:
        """The range of least cost, up to the largest value."""
        low, _ = super().range(data, spec)
        return low, data.maximum


def relative_tails(data: Density) -> Density:
    """The distribution with masses beyond T scaled by (T/|x|)²."""
    if data.exact and data.low.shape[1] < 1 / OUTLYING:
        return data  # the percentile is the largest value
    threshold = REACH * data.body(OUTLYING)[:, None]
    size = data.magnitude
    far = size > threshold
    if not far.any():
        return data
    return data.weighted(data.mass * np.where(far, np.square(threshold / np.where(far, size, 1.0)), 1.0))
