"""``bitwright auto``: model, data and an allowed drop in; the quantized network that meets it out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli import console
from bitwright.cli.quantize import read_overrides
from bitwright.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from bitwright_search.auto_result import AutoQuantResult


def auto(
    *,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model file.", show_default=False)],
    data: Annotated[
        Path, typer.Option(help="Calibration samples: .npz, .npy, or a folder of images.", show_default=False)
    ],
    allowed_drop: Annotated[
        float,
        typer.Option(help="Largest loss, in the evaluation's unit; of top-1, 0.01 is one point.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; made if it isn't there.", show_default=False)],
    labels: Annotated[
        Path | None, typer.Option(help="Class indices of the evaluation samples, for top-1.", show_default=False)
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="A function from the simulated model to a number, higher is better.",
            show_default=False,
        ),
    ] = None,
    evaluation_data: Annotated[
        Path | None, typer.Option(help="Samples that the labels belong to (default: --data).", show_default=False)
    ] = None,
    target: Annotated[str, typer.Option(help="A preset of `bitwright targets`, or a configuration file.")] = "default",
    weights: Annotated[
        str | None, typer.Option(help="Type of weights (default: the target's).", show_default=False)
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="Type of activations (default: the target's).", show_default=False)
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TYPE", help="As for `bitwright quantize`. Repeatable.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Techniques to try in this order (default: all that take part).", show_default=False),
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(help="Calibration schemes to try, as a,b,c.", show_default=False)
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Calibrate on only the first samples (default: all).", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 8,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Begin no stage after so much work.", show_default=False)
    ] = None,
    budget_evaluations: Annotated[
        int | None, typer.Option(min=2, help="Evaluate at most so often.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that evaluate side by side.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="Stem of the files written (default: the model's).", show_default=False)
    ] = None,
    encodings_version: Annotated[
        str, typer.Option(help="Schema of the encodings file: 0.6.1, 1.0.0, 2.0.0 or 2.1.0.")
    ] = "1.0.0",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Quantize a model so that it loses no more than an allowed drop.

    Tries calibration schemes and techniques until one is good enough, exports the best, and writes diagnosis.html.
    Exit status 1 if none was good enough. Interrupted, the same command goes on from the last finished stage.
    """
    from bitwright.formats import VERSIONS
    from bitwright.opening import open_model
    from bitwright.progress import progress_for, silent
    from bitwright_search.auto_quantize import auto_quantize

    if encodings_version not in VERSIONS:
        raise InputError(f"there is no encodings version {encodings_version!r}; there are {', '.join(VERSIONS)}")
    evaluation = read_evaluation(evaluate, labels, evaluation_data or data, batch_size)
    backend, native = open_model(model)
    from bitwright.data import open_data

    calibration = open_data(data, backend.input_specs(native), batch_size=batch_size, limit=calibration_samples)
    with silent() if quiet else progress_for(sys.stderr) as progress, pool(workers) as executor:
        result = auto_quantize(
            model, calibration, evaluation, allowed_drop=allowed_drop, target=target, weights=weights,
            activations=activations, overrides=read_overrides(override or []), seed=seed,
            schemes=schemes.split(",") if schemes else None, techniques=recipe, batch_size=batch_size, out=out,
            name=name, encodings_version=encodings_version, budget_seconds=budget_seconds,
            budget_evaluations=budget_evaluations, executor=executor, progress=progress,
        )  # fmt: skip
    _tell(result)


def read_evaluation(function: str | None, labels: Path | None, data: Path, batch_size: int) -> Any:
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


def pool(workers: int) -> Any:
    """An executor of so many processes; None, in a context, for one."""
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import nullcontext
    from multiprocessing import get_context

    # Forking a process whose runtime has threads can deadlock.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else nullcontext()


def _tell(result: AutoQuantResult) -> None:
    rows = [
        (t.name, t.status.value, "" if t.score is None else f"{t.score:.4f}",
         "" if t.score is None else f"{t.score - result.float_score:+.4f}", f"{t.seconds:.1f}")
        for t in result.trials
    ]  # fmt: skip
    console.table(("trial", "outcome", "score", "change", "seconds"), rows, numbers=("score", "change", "seconds"))
    console.say(str(result))
    for line in result.advice:
        console.say(f"- {line}")
    for path in result.files.values():
        console.say(str(path))
    if not result.met:
        raise CheckFailed(
            f"no network is within a drop of {result.allowed_drop:g}; the best, {result.best}, loses {result.drop:.4g} "
            "and was exported"
        )
