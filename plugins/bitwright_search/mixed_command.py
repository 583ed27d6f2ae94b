"""``bitwright mixed-precision``: model, data and a goal in; a network with a type for each group of layers out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli import console
from bitwright.cli.quantize import read_overrides
from bitwright.errors import CheckFailed, InputError
from bitwright_search.auto_command import read_evaluation

if TYPE_CHECKING:
    from bitwright_search.mixed_result import MixedPrecisionResult


def mixed(
    *,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model file.", show_default=False)],
    data: Annotated[
        Path, typer.Option(help="Calibration samples: .npz, .npy, or a folder of images.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; made if it isn't there.", show_default=False)],
    candidates: Annotated[
        str, typer.Option(help="Pairs of types of weights and activations, as WEIGHTS/ACTIVATIONS,….")
    ] = "int8/uint16,int8/uint8,int4/uint8",
    allowed_drop: Annotated[
        float | None,
        typer.Option(help="Find the cheapest that loses no more; of top-1, 0.01 is one point.", show_default=False),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Largest cost, as a share of the most precise candidate everywhere.", show_default=False),
    ] = None,
    lite: Annotated[
        float | None,
        typer.Option(help="No search: the most precise for so many percent, the most sensitive.", show_default=False),
    ] = None,
    cost: Annotated[str, typer.Option(help="bit_operations, weight_bytes or latency.")] = "bit_operations",
    latency: Annotated[Path | None, typer.Option(help="Latency table (JSON).", show_default=False)] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the latency table here, and write latency.json.")
    ] = False,
    solver: Annotated[str, typer.Option(help="exact or greedy.")] = "exact",
    recipe: Annotated[
        str | None, typer.Option(help="Techniques for every network that is evaluated.", show_default=False)
    ] = None,
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
    scheme: Annotated[str, typer.Option(help="Range setting of activations.")] = "sqnr",
    weight_scheme: Annotated[str, typer.Option(help="Range setting of weights.")] = "mse",
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TYPE", help="As for `bitwright quantize`. Repeatable.", show_default=False),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(min=1, help="Calibrate on only the first samples (default: all).", show_default=False)
    ] = None,
    sensitivity_samples: Annotated[int, typer.Option(min=1, help="Samples that sensitivities are measured on.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="Stem of the files written (default: the model's).", show_default=False)
    ] = None,
    encodings_version: Annotated[
        str, typer.Option(help="Schema of the encodings file: 0.6.1, 1.0.0, 2.0.0 or 2.1.0.")
    ] = "1.0.0",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Give each group of layers the bit widths that it needs.

    Writes the network, mixed_precision.json (the front, sensitivities, the assignment) and mixed_precision.html. Exit
    status 1 if the goal isn't reached. Interrupted, the same command goes on from what is finished.
    """
    from bitwright.data import open_data
    from bitwright.formats import VERSIONS
    from bitwright.opening import open_model
    from bitwright.progress import progress_for, silent
    from bitwright_search.mixed_precision import mixed_precision

    if encodings_version not in VERSIONS:
        raise InputError(f"there is no encodings version {encodings_version!r}; there are {', '.join(VERSIONS)}")
    if measure and latency is not None:
        raise InputError("give either --latency or --measure")
    pairs = [part for part in candidates.split(",") if part.strip()]
    asked = evaluate is not None or labels is not None
    evaluation = read_evaluation(evaluate, labels, evaluation_data or data, batch_size) if asked else None
    backend, native = open_model(model)
    calibration = open_data(data, backend.input_specs(native), batch_size=batch_size, limit=calibration_samples)
    with silent() if quiet else progress_for(sys.stderr) as progress:
        table: object = latency
        if measure:
            from bitwright.durable import make_directory
            from bitwright_search.latency_measure import measure_latency

            table = measure_latency(model, data, candidates=pairs, target=target, progress=progress,
                                    out=make_directory(out) / "latency.json")  # fmt: skip
            cost = "latency"
        result = mixed_precision(
            model, calibration, evaluation, candidates=pairs, allowed_drop=allowed_drop, budget=budget, lite=lite,
            cost=cost, latency=table, solver=solver, techniques=recipe,  # type: ignore[arg-type]
            sensitivity_samples=sensitivity_samples, target=target, scheme=scheme, weight_scheme=weight_scheme,
            overrides=read_overrides(override or []), seed=seed, batch_size=batch_size, out=out, name=name,
            encodings_version=encodings_version, progress=progress,
        )  # fmt: skip
    _tell(result)


def _tell(result: MixedPrecisionResult) -> None:
    chosen = {s.group: s for s in result.sensitivities if s.candidate == result.assignment[s.group]}
    rows = [
        (group, types, console.decibels(chosen[group].sqnr_db), f"{chosen[group].cost:.4g}")
        for group, types in result.assignment.items()
    ]
    console.table(("group", "types", "SQNR alone", "cost"), rows, numbers=("SQNR alone", "cost"))
    console.say(str(result))
    for line in result.notes:
        console.say(f"- {line}")
    for path in result.files.values():
        console.say(str(path))
    if not result.met:
        raise CheckFailed("no assignment reaches the goal; the best that was found was exported")
