"""Options of the search commands that say how a network is scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright_search.evaluation import FileFunction, Labelled

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
EvaluationData = Annotated[
    Path | None, typer.Option(help="Samples that the labels belong to (default: --data).", show_default=False)
]


def read_evaluation(function: str | None, labels: Path | None, data: Path, batch_size: int) -> FileFunction | Labelled:
    """What ``--evaluate`` or ``--labels`` ask for.

    Raises:
        InputError: neither or both are given, or one can't be used.
    """
    from bitwright_search.evaluation import FileFunction, Labelled

    if (function is None) == (labels is None):
        raise InputError("give either --labels, for top-1, or --evaluate FILE.py:FUNCTION")
    if labels is not None:
        return Labelled(data, labels, batch_size)
    return FileFunction.parse(str(function))
