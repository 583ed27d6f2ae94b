"""How scores read: accuracies in percent and their differences in points, other metrics as they are."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright_search.evaluation import ByMetric, Evaluate, Labelled

SHARES = ("top-1", "agreement")
"""Metrics that are shares of samples or positions."""


def metric_of(evaluate: Evaluate | None) -> str:
    """What an evaluation measures: "top-1", a metric's name, or "score" for a function of the user."""
    if isinstance(evaluate, Labelled):
        return "top-1"
    return evaluate.metric if isinstance(evaluate, ByMetric) else "score"


@dataclass(frozen=True)
class Scale:
    """Scores of one metric, for people.

    Attributes:
        metric: as `metric_of` gives it.
    """

    metric: str

    @property
    def label(self) -> str:
        """What stands at an axis."""
        return f"{self.metric}, %" if self.metric in SHARES else self.metric

    def place(self, score: float) -> float:
        """Where a score lies on an axis with that label."""
        return 100 * score if self.metric in SHARES else score

    def text(self, score: float) -> str:
        """A score."""
        return f"{score:.2%}" if self.metric in SHARES else number(score)

    def drop(self, loss: float, margin: float | None = None) -> str:
        """A difference of two scores, with its margin where there is one."""
        told = self.figure(loss) if margin is None else f"{self.figure(loss)} ± {self.figure(margin)}"
        return f"{told} points" if self.metric in SHARES else told

    def figure(self, score: float) -> str:
        """A score or a difference without its unit, where that stands elsewhere."""
        return f"{100 * score + 0.0:.2f}" if self.metric in SHARES else number(score)

    @property
    def unit_of_drops(self) -> str:
        """What a difference is in: ", points", or nothing."""
        return ", points" if self.metric in SHARES else ""


def number(value: float) -> str:
    """Four digits, without a minus before a zero."""
    return f"{value + 0.0:.4g}"
