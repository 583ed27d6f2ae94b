"""Metrics of networks with logits, written once: perplexity, divergence from float, agreement, top-1."""

from __future__ import annotations

from bitwright.metrics._classes import class_scores
from bitwright.metrics._metrics import (
    METRICS,
    Agreement,
    Divergence,
    Figure,
    Metric,
    Perplexity,
    Top1,
    are_probabilities,
    counted,
    metric_factory,
    token_input,
)
from bitwright.metrics._terms import Terms, student

__all__ = [
    "METRICS",
    "Agreement",
    "Divergence",
    "Figure",
    "Metric",
    "Perplexity",
    "Terms",
    "Top1",
    "are_probabilities",
    "class_scores",
    "counted",
    "metric_factory",
    "student",
    "token_input",
]
