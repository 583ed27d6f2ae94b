"""``bitwright collect``: model and data in; a bank of statistics out, or banks joined."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli import console, options
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.bank import Bank


def collect(
    *,
    model: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="The model file; with --merge, the banks.", show_default=False),
    ],
    out: options.OutputFolder,
    data: options.CalibrationSource = None,
    merge: Annotated[bool, typer.Option("--merge", help="Join banks of the same network into one.")] = False,
    techniques: Annotated[
        str | None,
        typer.Option(
            help="Techniques to apply first, without data, as a,b,c or a file: the bank is valid behind them.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="Whose tensors are kept beside those of all presets, and what techniques go by.")
    ] = "default",
    every_tensor: Annotated[
        bool, typer.Option("--every-tensor", help="Keep histograms of all tensors, for targets to come.")
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(help="Keep moments of these layers only: names or patterns, as a,b,c.", show_default=False),
    ] = None,
    budget_gib: Annotated[
        float | None,
        typer.Option(min=0, help="Size of all moments at most; the largest are left out first.", show_default=False),
    ] = None,
    moments_gib: Annotated[
        float,
        typer.Option(min=0, help="Memory of one layer's moments at most; one beyond it is kept in blocks of channels."),
    ] = 2.0,
    float64: Annotated[
        bool, typer.Option("--float64", help="Keep moments in twice the space, to merge many banks without loss.")
    ] = False,
    thin: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Let moments count one position of a sample for every so many features of a layer, 4 at least.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        int | None,
        typer.Option(min=1, help="Batches collected together, by a worker: all, or 8 of them.", show_default=False),
    ] = None,
    calibration_samples: options.SampleLimit = None,
    batch_size: options.BatchSize = 8,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    seed: Annotated[
        int, typer.Option(help="Of techniques that draw at random; what takes the bank has to have the same.")
    ] = 0,
    workers: options.Workers = 1,
    cluster: options.Cluster = None,
    quiet: options.Quiet = False,
) -> None:
    """Collect what calibration and layer-wise techniques need of data, once, for --bank.

    The bank holds histograms, ranges and second moments, and no sample. It is whole or not there at all.
    """
    if merge:
        from bitwright.bank import merge as joined

        if data is not None:
            raise InputError("--merge joins banks and takes no --data")
        return _tell(joined(model, out))
    if len(model) != 1:
        raise InputError(f"{len(model)} models: give one, or --merge to join banks")
    if data is None:
        raise InputError("give the samples to collect from: --data")
    from bitwright.bank import collect as collected
    from bitwright.simulation import QuantSim, read_recipe

    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data)
    steps = read_recipe(techniques)
    with options.shown_progress(quiet=quiet) as progress:
        sim = QuantSim(model[0], options.sample_of(model[0], data), target=target, seed=seed, progress=progress)
        dataset = sim.open(data, batch_size=batch_size, limit=calibration_samples, images=images)
        for step in steps:
            sim.apply(step.technique, **step.settings)
        bank = collected(
            sim, dataset, out, layers=layers.split(",") if layers else (), budget_gib=budget_gib,
            moments_gib=moments_gib,
            number="float64" if float64 else "float32", every_tensor=every_tensor, steps=steps.steps,
            share=share, thin=thin,
        )  # fmt: skip
    return _tell(bank)


def _tell(bank: Bank) -> None:
    record = bank.record
    console.say(
        f"{bank.path}: {record.samples} samples; {len(record.tensors)} tensors, {len(record.layers)} layers, "
        f"{bank.bytes / 2**20:.1f} MiB"
    )
    if record.thin is not None and record.moments:
        fewest = min(entry.count / (entry.features * entry.blocks) for entry in record.moments)
        console.say(f"thin {record.thin}: each layer has {fewest:.1f} columns a feature, or more")
    for op, reason in record.left_out.items():
        console.say(f"left out: {op}: {reason}")
