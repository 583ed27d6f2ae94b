"""What a mean consists of, sample by sample: how sure it is, and how sure a difference of two such means.

Positions of one sample have much in common, so samples are what is taken as independent. Two networks are compared on
the same samples: what makes a sample hard for both cancels, and the difference is far surer than either mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from bitwright.errors import InputError

NORMAL = 1000
"""Degrees of freedom from which on Student's distribution is the normal one, to some thousandths of its quantiles."""
_STEPS = 40_001


@dataclass(frozen=True)
class Terms:
    """A mean over positions (or samples), as the sums and counts of each sample.

    Attributes:
        sums: of each sample, in the order of the data.
        counts: positions of each sample that count; 0 where all are masked.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.sums) != len(self.counts):
            raise InputError(f"{len(self.sums)} sums don't go with {len(self.counts)} counts")

    @classmethod
    def single(cls, values: Iterable[float]) -> Terms:
        """Of one value a sample."""
        sums = tuple(map(float, values))
        return cls(sums, (1,) * len(sums))

    @property
    def samples(self) -> int:
        """Those that count."""
        return sum(n > 0 for n in self.counts)

    @property
    def mean(self) -> float:
        """Over all positions.

        Raises:
            InputError: none counts.
        """
        if not (total := sum(self.counts)):
            raise InputError("nothing counts: every position is masked, or there is none")
        return math.fsum(self.sums) / total

    def __neg__(self) -> Terms:
        return Terms(tuple(-v for v in self.sums), self.counts)

    def __sub__(self, other: Terms) -> Terms:
        """The difference on the same samples.

        Raises:
            InputError: they aren't the same.
        """
        if self.counts != other.counts:
            raise InputError(
                f"two networks were evaluated on different samples ({len(self.counts)} and {len(other.counts)}, or "
                "other positions of them): give both the same data"
            )
        return Terms(tuple(a - b for a, b in zip(self.sums, other.sums, strict=True)), self.counts)

    @property
    def error(self) -> float | None:
        """Standard error of the mean, samples being independent (a ratio estimator's: Cochran 1977, section 6.4).

        None of fewer than two samples, which don't say.
        """
        if (n := self.samples) < 2:
            return None
        sums, counts = np.array(self.sums, np.float64), np.array(self.counts, np.float64)
        squares = np.square(sums - self.mean * counts).sum()
        return float(np.sqrt(n / (n - 1) * squares) / counts.sum())

    def margin(self, confidence: float) -> float | None:
        """How far the true mean may lie above this one, or below, with a probability: Student's t of one side.

        Args:
            confidence: at least 0.5, which leaves no margin, and less than 1.
        """
        error = self.error
        return None if error is None else student(confidence, self.samples - 1) * error


@functools.cache
def student(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution.

    Args:
        probability: at least 0.5 and less than 1.
        freedom: degrees of freedom, at least 1.

    Raises:
        InputError: outside of that.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise InputError(f"Student's t: probability {probability} and {freedom} degrees of freedom; give 0.5 ≤ p < 1")
    if freedom > NORMAL:
        return NormalDist().inv_cdf(probability)
    # With t = √ν tan θ the density is cos^(ν − 1) θ, which is summed by Simpson's rule up to each second θ.
    angle = np.linspace(0.0, np.pi / 2, _STEPS)
    density = np.cos(angle) ** (freedom - 1)
    pieces = density[:-2:2] + 4 * density[1:-1:2] + density[2::2]
    share = np.concatenate([[0.0], np.cumsum(pieces)])
    found = np.interp(2 * probability - 1, share / share[-1], angle[::2])
    return float(np.sqrt(freedom) * np.tan(found))
