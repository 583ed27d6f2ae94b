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
        shares: each position has 0 or 1, as of an accuracy, or in a difference -1, 0 or 1.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]
    shares: bool = False

    def __post_init__(self) -> None:
        if len(self.sums) != len(self.counts):
            raise InputError(f"{len(self.sums)} sums don't go with {len(self.counts)} counts")

    @classmethod
    def single(cls, values: Iterable[float]) -> Terms:
        """Of one value a sample; shares if each is 0 or 1."""
        sums = tuple(map(float, values))
        return cls(sums, (1,) * len(sums), shares=all(v in (0.0, 1.0) for v in sums))

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
        return Terms(tuple(-v for v in self.sums), self.counts, self.shares)

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
        sums = tuple(a - b for a, b in zip(self.sums, other.sums, strict=True))
        return Terms(sums, self.counts, self.shares and other.shares)

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
        """How far the true mean may lie above this one with a probability; None of fewer than two samples.

        By Student's t of one side. Shares of few samples, or of which few change, aren't near normal, and where none
        changes their standard error is 0: theirs is the score interval's (`changes_bound`), and of samples of several
        positions at least what it is if those are independent.

        Args:
            confidence: at least 0.5, which leaves no margin, and less than 1.
        """
        if (error := self.error) is None:
            return None
        usual = student(confidence, self.samples - 1) * error
        if not self.shares:
            return usual
        lost, gained = (sum(max(sign * v, 0.0) for v in self.sums) for sign in (1, -1))
        bound = changes_bound(lost, gained, sum(self.counts), confidence) - self.mean
        return bound if max(self.counts) == 1 else max(usual, bound)


def changes_bound(lost: float, gained: float, count: int, confidence: float) -> float:
    """Upper bound of a difference of two shares of the same positions, by the score test (Tango 1998).

    It is the largest Δ that the counts don't contradict: ``nΔ − (b − c) = z √(n (2q + Δ(1 − Δ)))`` with b lost and c
    gained of n, and q the likeliest share of gains if Δ is the difference. With c = 0 it is Wilson's of b of n.

    Args:
        lost, gained: positions that have 1 and -1.
        count: all positions, more than 0.
        confidence: at least 0.5 and less than 1.
    """
    z = NormalDist().inv_cdf(confidence)

    def contradicted(delta: float) -> bool:
        linear = (2 * count - lost + gained) * delta - lost - gained
        root = math.sqrt(max(linear * linear + 8 * count * gained * delta * (1 - delta), 0.0))
        variance = count * ((root - linear) / (2 * count) + delta * (1 - delta))
        return count * delta - (lost - gained) > z * math.sqrt(max(variance, 0.0))

    low, high = (lost - gained) / count, 1.0
    if z == 0:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if contradicted(middle) else (middle, high)
    return high


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
