"""``bitwright analyze | visualize | validate``. What is heavy is imported when a command runs."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli import options
from bitwright.errors import InputError

if TYPE_CHECKING:
    from bitwright.bank import Bank
    from bitwright.simulation import QuantSim
    from bitwright_analysis.records import Analysis, Hint

SHOWN = 10


def analyze(
    *,
    model: options.Model,
    out: Annotated[
        Path,
        typer.Option(help="Folder for analysis.json and analysis.html; made if it isn't there.", show_default=False),
    ],
    data: options.CalibrationSource = None,
    bank: options.Bank = None,
    labels: options.Labels = None,
    target: options.Target = "default",
    weights: options.WeightType = None,
    activations: options.ActivationType = None,
    kv_cache: options.KvCache = None,
    scheme: options.Scheme = "sqnr",
    weight_scheme: options.WeightScheme = "minmax",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Techniques to apply first, as a,b,c or a file; none for nothing.", show_default="fold_batch_norm"
        ),
    ] = None,
    override: options.Overrides = None,
    sweep_by: Annotated[
        str, typer.Option(help="What sensitivities are measured by: sqnr, or evaluate (needs --labels).")
    ] = "sqnr",
    sweep_samples: Annotated[int, typer.Option(min=0, help="Samples for sensitivities by sqnr; 0 takes all.")] = 128,
    accumulator_bits: Annotated[int, typer.Option(min=8, max=64, help="Width of the target's accumulators.")] = 32,
    samples: options.SampleLimit = None,
    batch_size: options.BatchSize = 8,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    name: Annotated[
        str | None, typer.Option(help="What the page calls the model (default: its file's stem).", show_default=False)
    ] = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find out where quantization hurts in a model, and what to do about it.

    With --bank nothing is measured: what each layer loses at its types follows from the bank, and goes to layers.json.
    Interrupted, the same command goes on from the last finished measurement.
    """
    from bitwright.cli.labels import read_labels
    from bitwright.data import labels_of
    from bitwright.runs import run_in
    from bitwright.simulation import QuantSim, read_recipe
    from bitwright.technique import Recipe, Step
    from bitwright_analysis.analyzer import quant_analyzer
    from bitwright_analysis.plots import require_bokeh

    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data)
    source = options.open_bank(data, bank)
    if source is None:
        require_bokeh()
    elif labels is not None:
        raise InputError("--labels are those of --data; a bank has no samples to evaluate")
    steps = Recipe((Step("fold_batch_norm"),)) if recipe is None else read_recipe(None if recipe == "none" else recipe)
    known = None if labels is None else read_labels(labels, None)
    with options.shown_progress(quiet=quiet or as_json) as progress:
        sim = QuantSim(
            model,
            options.sample_of(model, data),
            target=target,
            weights=weights,
            activations=activations,
            scheme=scheme,
            weight_scheme=weight_scheme,
            overrides=options.read_overrides(override),
            kv_cache=kv_cache,
            seed=seed,
            progress=progress,
        )
        if source is not None:
            before, rest = options.steps_before(source, steps)
            for step in before:
                sim.apply(step.technique, **step.settings)
            for step in rest:
                sim.apply(step.technique, source, **step.settings)
            return _on_bank(sim.calibrate(source), source, out, as_json=as_json)
        assert data is not None
        dataset = sim.open(data, batch_size=batch_size, limit=samples, images=images)
        if known is not None:  # before any work
            labels_of(known, dataset, limit=samples, fixed=sim.fixed_batch)
        with run_in(out) as run:
            sim.attach(run=run)
            for step in steps:
                sim.apply(step.technique, dataset, **step.settings)
            analysis = quant_analyzer(
                sim,
                dataset,
                labels=known,
                limit=samples,
                out=out,
                name=name,
                sweep_by=sweep_by,
                sweep_samples=sweep_samples or None,
                accumulator_bits=accumulator_bits,
                progress=progress,
            )
            run.finish()
    if as_json:
        sys.stdout.write(analysis.model_dump_json(indent=1) + "\n")
    else:
        _show(analysis, out)


def _on_bank(sim: QuantSim, bank: Bank, out: Path, *, as_json: bool) -> None:
    from bitwright.cli import console
    from bitwright_analysis.bank_noise import layer_noises, write

    noises = layer_noises(sim, bank)
    path = write(noises, out)
    if as_json:
        sys.stdout.write(path.read_text())
        return
    console.table(
        ("layer", "output, weights rounded", "input on its grid"),
        ((n.layer, console.decibels(n.weights_db), console.decibels(n.inputs_db)) for n in noises),
        numbers=("output, weights rounded", "input on its grid"),
    )
    console.say("signal to noise of each layer alone, predicted from the bank; give --data to measure the network")
    console.say(str(path))


def _show(analysis: Analysis, out: Path) -> None:
    from bitwright.cli import console

    console.say(analysis.verdict)
    console.say(f"{analysis.name} on {analysis.target}: {analysis.widths}")

    def score(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}" if analysis.overall[0].score is not None else f"{value:.4g}"

    console.table(
        ("", "top-1", "output SQNR") if analysis.overall[0].score is not None else ("", "output SQNR"),
        (
            tuple(
                x
                for x in (
                    o.setting,
                    score(o.score) if o.score is not None else None,
                    "" if o.setting == "float" else console.decibels(o.sqnr_db),
                )
                if x is not None
            )
            for o in analysis.overall
            if o.setting != "float" or o.score is not None
        ),
        numbers=("top-1", "output SQNR"),
    )
    console.say("\nmost sensitive sites:")
    unit = "SQNR, dB" if analysis.measure == "SQNR" else analysis.measure
    columns = ("site", "kind", "op", f"alone: {unit}", f"all but it: {unit}", "share of harm")
    console.table(
        columns,
        (
            (s.unit, s.kind, s.op, _figure(s.alone), _figure(s.without), f"{s.share:.1%}")
            for s in analysis.ranking()[:SHOWN]
        ),
        numbers=columns[3:],
    )
    console.say("")
    for a in analysis.advice:
        console.say(f"- {a.text}")
    for file in analysis.files.values():
        console.say(str(out / file))


def _figure(value: float | None) -> str:
    return "exact" if value is None else f"{value:.4g}"


def visualize(
    *,
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="The model file before.", show_default=False)],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="The model file after.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The page to write (.html).", show_default=False)],
    data: Annotated[Path | None, typer.Option(help="Samples, to draw activations too.", show_default=False)] = None,
    samples: options.SampleLimit = None,
    batch_size: options.BatchSize = 8,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    quiet: options.Quiet = False,
) -> None:
    """Draw weights and activations before and after a technique, each over the other."""
    from bitwright.cli import console
    from bitwright_analysis.visualization import visualize as run

    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data)
    shown = None if data is None else options.as_images(data, images)
    with options.shown_progress(quiet=quiet) as progress:
        found = run(before, after, shown, out=out, batch_size=batch_size, limit=samples, progress=progress)
    changed = sum(c.sqnr_db is not None for c in found.changes)
    console.say(f"{len(found.changes)} parameters and tensors, {changed} parameters changed: {found.file}")


def validate(
    *,
    model: options.Model,
    target: options.Target = "default",
    weights: options.WeightType = None,
    activations: options.ActivationType = None,
    multiple: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Channels that the target works on at once (default: 32 for Hexagon, else 8).",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Some samples: which types a transformer's tensors need.", show_default=False),
    ] = None,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    as_json: options.Json = False,
) -> None:
    """Say in advance what quantizing a model will meet, and what in its architecture stands in the way.

    With --data, what a transformer's residual stream needs, as overrides, with what they gain. Exits with 1 if the
    model can't be quantized at all.
    """
    import json
    from dataclasses import asdict

    from bitwright.cli import console
    from bitwright.errors import CheckFailed
    from bitwright.simulation import QuantSim
    from bitwright.verify import validate as run
    from bitwright_analysis.family_types import family_types, told
    from bitwright_analysis.hints import architecture_hints

    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data)
    found = run(model, target=target, weights=weights, activations=activations)
    hints: Sequence[Hint] = ()
    family = None
    with warnings.catch_warnings():
        for notice in found.notices:  # which opening it again would tell again
            warnings.filterwarnings("ignore", re.escape(notice))
        if found.opened:
            hints = architecture_hints(model, target, multiple=multiple)
        if found.opened and data is not None:
            sample = options.sample_of(model, data)
            sim = QuantSim(model, sample, target=target, weights=weights, activations=activations)
            sim.apply("fold_batch_norm")
            samples = sim.open(data, images=images)
            family = family_types(sim.calibrate(samples), samples)
    if as_json:
        record = {**asdict(found), "hints": [h.model_dump() for h in hints]}
        if data is not None:
            record["family"] = None if family is None else family.model_dump()
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
    else:
        console.say(str(found))
        if family is not None:
            console.say(told(family))
        if hints:
            console.say("")
            console.table(("op", "level", "what", "way out"), ((h.where, h.level, h.what, h.remedy) for h in hints))
    if not found.opened:
        raise CheckFailed(found.error)
