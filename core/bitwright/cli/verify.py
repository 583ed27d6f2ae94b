"""``bitwright verify``: does the integer runtime compute what the simulation promised?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli import console, options
from bitwright.errors import CheckFailed

if TYPE_CHECKING:
    from bitwright.verify import Verification

SHOWN_TENSORS = 10
_VIEWS = {"plain": "plain session"}


def verify(
    *,
    directory: options.ExportDirectory,
    data: options.VerifiedData = None,
    labels: options.Labels = None,
    as_json: options.Json = False,
    samples: options.SampleLimit = None,
    batch_size: options.BatchSize = 8,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    name: options.ExportName = None,
    float_model: Annotated[
        Path | None,
        typer.Option(
            "--float", help="The original model (default: the one that the report names).", show_default=False
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="The integer runtime: onnxruntime, tflite or a plugin's (default: the target's).", show_default=False
        ),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fail if the integer runtime and float agree on less.", show_default=False),
    ] = None,
    min_sqnr: Annotated[
        float | None,
        typer.Option(
            help="Fail if an output of the integer runtime has fewer decibels of signal to noise, against float.",
            show_default=False,
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0, help="Fail if integer accuracy is more points below float (needs --labels).", show_default=False
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Compare float, simulation, exact integers and the integer runtime, with each other and with the export's record.

    Exits with 1 if one departs beyond rounding, a file was changed, a part of an output is crushed, or a limit that
    was given isn't kept; a line for each says where.
    """
    from bitwright.cli.labels import read_labels
    from bitwright.verify import verify as run

    if max_drop is not None and labels is None:
        raise typer.BadParameter("--max-drop needs --labels")
    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data)
    known = read_labels(labels, None) if labels is not None else None
    with options.shown_progress(quiet=quiet or as_json) as progress:
        result = run(
            directory,
            None if data is None else options.as_images(data, images),
            known,
            name=name,
            batch_size=batch_size,
            limit=samples,
            progress=progress,
            float_model=float_model,
            runtime=runtime,
        )
    if as_json:
        sys.stdout.write(result.model_dump_json(indent=1) + "\n")
    else:
        _show(result)
    if failures := [*result.problems, *_broken_limits(result, min_agreement, min_sqnr, max_drop)]:
        for failure in failures[:-1]:
            console.complain(f"bitwright: {failure}")
        raise CheckFailed(failures[-1])


def _broken_limits(
    result: Verification, min_agreement: float | None, min_sqnr: float | None, max_drop: float | None
) -> list[str]:
    """Limits of the user's own that an output doesn't keep; the simulation's where there is no integer runtime."""
    broken = []
    view = "integer" if any("integer_float" in o.sqnr_db for o in result.outputs) else "simulated"
    several = len(result.outputs) > 1
    if min_agreement is not None and result.outputs and not any(o.agreement for o in result.outputs):
        broken.append("--min-agreement: no output has several values a sample to compare classes of; ask --min-sqnr")
    for output in result.outputs:
        named = f" in output {output.name!r}" if several else ""
        agreement, sqnr = output.agreement.get(f"{view}_float"), output.sqnr_db.get(f"{view}_float")
        if min_agreement is not None and agreement is not None and agreement < min_agreement:
            broken.append(
                f"{view} and float agree on {agreement:.4f} of the samples{named}, {min_agreement:g} is asked"
            )
        if min_sqnr is not None and sqnr is not None and sqnr < min_sqnr:
            broken.append(f"{view} against float has {sqnr:.1f} dB{named}, {min_sqnr:g} dB are asked")
    if max_drop is not None and {view, "float"} <= result.accuracy.keys():
        drop = 100 * (result.accuracy["float"] - result.accuracy[view])
        if drop > max_drop:
            broken.append(f"{view} top-1 is {drop:.2f} points below float, {max_drop:g} are allowed")
    return broken


def _by_reason(uncovered: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for op, reason in uncovered.items():
        found.setdefault(reason, []).append(op)
    return found


def _show(result: Verification) -> None:
    if not result.parts:
        samples = "1 sample" if result.samples == 1 else f"{result.samples} samples"
        console.say(f"{samples}; float is the {result.float_model} model")
    for note in result.notes:
        console.say(f"note: {note}")
    if result.parts:
        for name, part in result.parts.items():
            console.say(f"\n{name}:")
            _show(part.model_copy(update={"notes": [n for n in part.notes if n not in result.notes]}))
        return
    if not result.outputs:
        return
    rows: list[tuple[str, ...]] = []
    for view in ("float", "simulated", "integer"):
        accuracy = result.accuracy.get(view)
        pair = f"{view}_float"
        if view == "integer" and not any(pair in o.sqnr_db for o in result.outputs):
            continue
        rows.append(
            (
                f"integer ({result.runtime})" if view == "integer" else view,
                "" if accuracy is None else console.percent(accuracy),
                "" if pair not in result.agreement else console.percent(result.agreement[pair]),
                "" if pair not in result.sqnr_db else console.decibels(result.sqnr_db[pair]),
            )
        )
    if (plain := result.plain) is not None:
        shown = "" if plain.accuracy is None else console.percent(plain.accuracy)
        rows.append(
            (
                "plain session",
                shown,
                "" if plain.agreement is None else console.percent(plain.agreement),
                console.decibels(plain.sqnr_db),
            )
        )
    columns: tuple[str, ...] = ("", "top-1", "same class as float", "output SQNR")
    if not result.accuracy:
        columns, rows = (columns[0], *columns[2:]), [(row[0], *row[2:]) for row in rows]
    console.table(columns, rows, numbers=columns[1:])
    for output in result.outputs[1:]:
        figures = {view: output.sqnr_db.get(f"{view}_float") for view in ("simulated", "integer", "plain")}
        told = [f"{_VIEWS.get(view, view)} {console.decibels(db)}" for view, db in figures.items() if db is not None]
        console.say(f"output {output.name!r}: {', '.join(told) or 'no figure'}")
    if "integer_simulated" in result.sqnr_db:
        same = result.agreement.get("integer_simulated")
        console.say(
            f"simulation and {result.runtime}: "
            + ("" if same is None else f"{console.percent(same)} same class, ")
            + console.decibels(result.sqnr_db["integer_simulated"])
        )
    if plain is not None:
        for line in filter(None, (plain.proof, plain.rounding)):
            console.say(line)
    if result.exact:
        exact = result.exact
        console.say(
            f"exact integer simulation: {exact['integer_ops']:.0f} ops in integers, {exact['float_ops']:.0f} in float, "
            f"{console.percent(exact['output_differs'])} of output values differ from the runtime's, "
            f"accumulators use {console.percent(exact['peak_accumulator'])} of int32"
        )
    if result.uncovered:
        listed = len(result.uncovered)
        console.say(f"{'1 op is' if listed == 1 else f'{listed} ops are'} not compared code by code, but as float:")
        for reason, ops in list(_by_reason(result.uncovered).items())[:SHOWN_TENSORS]:
            console.say(f"  {ops[0]}{f' and {len(ops) - 1} more' if len(ops) > 1 else ''}: {reason}")
    if result.tensors:
        differ = any(t.simulated_differs for t in result.tensors)
        most = "in which simulation and runtime differ most" if differ else "that the simulation changes most"
        console.say(f"\ntensors {most}:")
        console.table(
            ("tensor", "SQNR to float", "codes that differ", "by steps"),
            (
                (
                    t.name,
                    console.decibels(t.sqnr_db),
                    "" if t.simulated_differs is None else console.percent(t.simulated_differs),
                    t.simulated_max_steps,
                )
                for t in result.tensors[:SHOWN_TENSORS]
            ),
            numbers=("SQNR to float", "codes that differ", "by steps"),
        )
