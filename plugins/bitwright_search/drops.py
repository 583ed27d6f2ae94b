"""How much a network loses against the float one, how sure that is, and whether it is no more than is allowed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.errors import InputError
from bitwright.metrics import Terms
from bitwright_search.evaluation import ByMetric, Evaluate, Score
from bitwright_search.scores import SHARES, metric_of

REPORTED = 0.95
"""Probability of the margins that are reported where drops are judged without one."""
GRADED = ("perplexity", "kl")
"""Metrics whose drops are judged with a margin unless said otherwise: they tell small losses from few samples. Of
shares, as top-1, each sample that changes is a whole step, and a margin asks for thousands of them."""

ONE_SAMPLE = "The evaluation has one sample, which doesn't say how sure the drop is: give several."

SCORE_FORM = 3
"""Raised where stored scores hold something else."""


@dataclass(frozen=True)
class Drop:
    """A loss against the float network.

    Attributes:
        value: on the samples that were evaluated.
        margin: the loss on others like them lies at most so much above it, with the probability asked for; None where
            the evaluation doesn't say what single samples have, or there is one.
    """

    value: float
    margin: float | None = None


@dataclass(frozen=True)
class Allowance:
    """What a network may lose.

    Attributes:
        drop: largest loss that is good enough.
        confidence: probability with which it must be kept on samples like those evaluated; None judges by the loss on
            those alone.
        asked: the user has asked for the confidence; an evaluation that can't give it is refused then.
    """

    drop: float
    confidence: float | None = None
    asked: bool = False

    @classmethod
    def of(cls, drop: float, confidence: float | None, evaluate: Evaluate | None) -> Allowance:
        """With the confidence that an evaluation has by default, where none is given.

        Raises:
            InputError: it is no probability of at least one half; or the drop of a share is 1 or more, which every
                network keeps.
        """
        if (metric := metric_of(evaluate)) in SHARES and drop >= 1:
            raise InputError(
                f"an allowed drop of {drop:g} is {100 * drop:g} points of {metric}, which every network keeps: a point "
                f"is 0.01{f', {drop:g} points are {drop / 100:g}' if 1 < drop < 100 else ''}"
            )
        if confidence is None:
            graded = isinstance(evaluate, ByMetric) and evaluate.metric.partition(":")[0] in GRADED
            return cls(drop, REPORTED if graded else None)
        if not 0.5 <= confidence < 1:
            raise InputError(
                f"confidence={confidence}: give a probability, at least 0.5 (the mean alone) and less than 1, as 0.95"
            )
        return cls(drop, confidence if confidence > 0.5 else None, asked=True)

    def lost(self, reference: Score, score: Score) -> Drop:
        """What a network loses against the float one's score."""
        value, margin = reference.value - score.value, None
        if reference.terms is not None and score.terms is not None:
            margin = (reference.terms - score.terms).margin(self.confidence or REPORTED)
        return Drop(value, margin)

    def keeps(self, reference: Score, score: Score) -> bool:
        """Whether a loss is no more than is allowed; the last bit of a difference doesn't decide.

        Raises:
            InputError: a margin was asked for, and this network's score has none.
        """
        lost = self.lost(reference, score)
        if lost.margin is None:
            self.require(score)
        most = lost.value + (0.0 if self.judged(lost) is None else lost.margin or 0.0)
        return most <= self.drop + 1e-12 * max(1.0, abs(reference.value))

    def judged(self, lost: Drop) -> float | None:
        """The confidence with which a network was judged: None without a margin."""
        return None if lost.margin is None else self.confidence

    def check(self, reference: Score) -> None:
        """As `require`; warns of a drop that, by the float network's score, may be no limit at all.

        Raises:
            InputError: see `require`.
        """
        if 0 < reference.value <= 1 <= self.drop:
            warnings.warn(
                f"the float network scores {reference.value:.4g}, and the allowed drop is {self.drop:g}: if the score "
                "is a share, every network keeps it; a point is 0.01",
                stacklevel=2,
            )
        self.require(reference)

    def require(self, reference: Score) -> None:
        """Refuse a margin that was asked for and that the evaluation, by the float network's score, can't give.

        Raises:
            InputError: it can't.
        """
        if self.asked and self.confidence is not None and (reference.terms is None or reference.terms.samples < 2):
            raise InputError(
                f"confidence={self.confidence:g} takes what single samples have, of two and more: evaluate by a "
                "metric or labels, or let `evaluate` return an array with a score for each sample"
            )


def recorded(score: Score) -> dict[str, Any]:
    """A score as JSON takes it."""
    terms = score.terms
    told = None if terms is None else [list(terms.sums), list(terms.counts), terms.shares]
    return {"score": score.value, "terms": told}


def read_score(record: Mapping[str, Any]) -> Score:
    """Of what `recorded` made."""
    terms = record["terms"]
    return Score(record["score"], None if terms is None else Terms(tuple(terms[0]), tuple(terms[1]), terms[2]))
