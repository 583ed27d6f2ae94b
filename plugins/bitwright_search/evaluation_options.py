"""Options of the search commands that say how a network is scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.data import Images
    from bitwright_search.evaluation import ByMetric, FileFunction, Labelled

EvaluationLabels = Annotated[
    Path | None, typer.Option(help="Class indices of the evaluation samples, for top-1.", show_default=False)
]
EvaluationFunction = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:FUNCTION",
        help="A function from the simulated model to a number, higher is better.",
        show_default=False,
    ),
]
EvaluationMetric = Annotated[
    str | None,
    typer.Option(
        help="A metric of the outputs: perplexity (a drop is in nats: 0.077 is 1.08 times as high), kl or agreement.",
        show_default=False,
    ),
]
EvaluationData = Annotated[
    Path | None, typer.Option(help="Samples that labels and metrics are about (default: --data).", show_default=False)
]

Confidence = Annotated[
    float | None,
    typer.Option(
        help="Probability with which the drop must be kept on other samples like these; 0.5 judges by the drop on "
        "these alone (default: 0.95 of perplexity and kl, otherwise 0.5).",
        show_default=False,
    ),
]


def read_evaluation(
    function: str | None, labels: Path | None, data: Path | Images | None, batch_size: int, metric: str | None = None
) -> FileFunction | Labelled | ByMetric:
    """What ``--evaluate``, ``--labels`` or ``--metric`` ask for.

    Raises:
        InputError: none or several are given, or one can't be used.
    """
    from bitwright.metrics import metric_factory
    from bitwright_search.evaluation import ByMetric, FileFunction, Labelled

    if sum(given is not None for given in (function, labels, metric)) != 1:
        raise InputError(
            "give either --labels, for top-1, --metric, such as perplexity, or --evaluate FILE.py:FUNCTION"
        )
    if function is not None:
        return FileFunction.parse(function)
    if data is None:
        raise InputError("--labels and --metric need samples, and a bank has none: give --evaluation-data")
    if metric is not None:
        metric_factory(metric)
        return ByMetric(data, metric, batch_size)
    assert labels is not None
    return Labelled(data, labels, batch_size)
