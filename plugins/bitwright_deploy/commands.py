"""``bitwright layer-outputs | compare | target-commands``. What is heavy is imported when a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.cli import options

if TYPE_CHECKING:
    from bitwright_deploy.departures import Departures

SHOWN = 20


def layer_outputs(
    *,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|MODEL", help="What `bitwright quantize --out` wrote, or a model file.", show_default=False
        ),
    ],
    data: options.Samples,
    out: Annotated[Path, typer.Option(help="Folder to write to; an earlier dump is replaced.", show_default=False)],
    float_model: Annotated[
        bool, typer.Option("--float", help="Of the float network, not of the simulated one.")
    ] = False,
    layout: Annotated[str, typer.Option(help="NHWC, or native for the model's own.")] = "NHWC",
    tensor: Annotated[
        list[str] | None, typer.Option(help="Only this tensor; repeatable (default: every one).", show_default=False)
    ] = None,
    name: options.ExportName = None,
    samples: options.SampleLimit = None,
    batch_size: options.BatchSize = 8,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    quiet: options.Quiet = False,
) -> None:
    """Write each layer's output, one folder a sample, as the tools of targets dump and compare them.

    A model file that is not an export can only be dumped with --float.
    """
    from bitwright.cli import console
    from bitwright_analysis.exported import exported, samples_of
    from bitwright_deploy.layer_outputs import layer_outputs as run

    if not source.is_dir() and not float_model:
        raise typer.BadParameter(f"{source} is a model without grids: give an export's folder, or --float")
    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data)
    given = options.as_images(data, images)
    with options.shown_progress(quiet=quiet) as progress:
        model: Any = exported(source, name, progress=progress) if source.is_dir() else source
        dump = run(
            model,
            samples_of(source, given, name) if source.is_dir() else given,
            out,
            layout=layout,
            quantized=not float_model,
            tensors=tensor or None,
            limit=samples,
            batch_size=batch_size,
            progress=progress,
        )
    console.say(f"{len(dump.index.tensors)} tensors of {dump.index.samples} samples, {dump.index.layout}: {out}")


def compare(
    *,
    reference: Annotated[
        Path,
        typer.Argument(
            metavar="DUMP|DIR", help="What `bitwright layer-outputs` wrote, or an export's folder.", show_default=False
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="The target's dump: Result_0/*.raw …, or .npz.", show_default=False)
    ],
    data: Annotated[
        Path | None, typer.Option(help="The samples, where DIR is an export's folder.", show_default=False)
    ] = None,
    min_sqnr: Annotated[float, typer.Option(help="Decibels; a tensor below departs.")] = 20.0,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="TENSOR=NAME", help="The target's name for a tensor. Repeatable.", show_default=False),
    ] = None,
    samples: options.SampleLimit = None,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    as_json: options.Json = False,
) -> None:
    """Say where a target's tensors first depart from the simulation's.

    Exits with 1 if one does.
    """
    from bitwright.errors import CheckFailed
    from bitwright_analysis.exported import exported, samples_of
    from bitwright_deploy.departures import compare as run

    names = {}
    for text in rename or []:
        tensor, _, name = text.rpartition("=")
        if not tensor or not name:
            raise typer.BadParameter(f"--rename {text!r} isn't of the form TENSOR=NAME")
        names[tensor] = name
    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data)
    if data is None:
        found = run(reference, target, min_sqnr=min_sqnr, names=names)
    else:
        given = samples_of(reference, options.as_images(data, images))
        found = run(exported(reference), target, given, min_sqnr=min_sqnr, names=names, limit=samples)
    if as_json:
        sys.stdout.write(found.model_dump_json(indent=1) + "\n")
    else:
        _show(found)
    if found.first is not None:
        raise CheckFailed(str(found))


def _show(found: Departures) -> None:
    from bitwright.cli import console

    first = next((i for i, r in enumerate(found.rows) if r.departs), len(found.rows))
    begin = max(0, min(first - 3, len(found.rows) - SHOWN))
    columns = ("tensor", "op", "target's name", "SQNR", "largest error", "in steps", "cosine", "")
    console.table(
        columns,
        (
            (
                r.tensor,
                f"{r.op} ({r.type})",
                r.target,
                "" if r.cosine is None and r.sqnr_db is None and r.note else console.decibels(r.sqnr_db),
                "" if r.max_error is None else f"{r.max_error:.4g}",
                "" if r.max_steps is None else f"{r.max_steps:.1f}",
                "" if r.cosine is None else f"{r.cosine:.6f}",
                ("departs" if r.departs else "") + (f" ({r.note})" if r.note else ""),
            )
            for r in found.rows[begin : begin + SHOWN]
        ),
        numbers=columns[3:7],
    )
    if found.first is None:
        console.say(str(found))


def target_commands(
    *,
    directory: options.ExportDirectory,
    tool: Annotated[
        str,
        typer.Option(help="qnn, snpe, qairt, onnxruntime, tflite, tensorrt, or one of a plugin.", show_default=False),
    ],
    data: Annotated[str, typer.Option(help="Samples for the comparison, as the lines are to name them.")] = "DATA",
    name: options.ExportName = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=1,3,…", help="Shape of an input that leaves dimensions free. Repeatable.", show_default=False
        ),
    ] = None,
    soc: Annotated[str | None, typer.Option(help="Of Qualcomm's tools, such as sm8650.", show_default=False)] = None,
) -> None:
    """Print the command lines that bring an export onto a target, in order; nothing is run."""
    from bitwright.cli import console
    from bitwright_deploy.target_commands import target_commands as run

    shapes = {}
    for text in input_shape or []:
        key, _, value = text.rpartition("=")
        if not key or not all(part.strip().isdigit() for part in value.split(",")):
            raise typer.BadParameter(f"--input-shape {text!r} isn't of the form NAME=1,3,224,224")
        shapes[key] = tuple(int(part) for part in value.split(","))
    found = run(directory, tool, name=name, data=data, input_shapes=shapes, soc=soc)
    for warning in found.warnings:
        console.complain(f"warning: {warning}")
    if found.schemas:
        taken = ", ".join(sorted(found.schemas))
        console.say(f"# {found.tool} takes encodings of schema {taken}; this export has {found.schema}")
    for command in found.commands:
        console.say(f"# {command.purpose}\n{command.line}")
