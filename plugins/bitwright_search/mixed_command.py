"""``bitwright mixed-precision``: model, data and a goal in; a network with a type for each group of layers out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli import console, options
from bitwright.errors import CheckFailed, InputError
from bitwright_search.evaluation_options import (
    Confidence,
    EvaluationData,
    EvaluationFunction,
    EvaluationLabels,
    EvaluationMetric,
    read_evaluation,
)

if TYPE_CHECKING:
    from bitwright_search.mixed_result import MixedPrecisionResult


def mixed(
    *,
    model: options.Model,
    out: options.OutputFolder,
    data: options.CalibrationSource = None,
    bank: options.Bank = None,
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
    labels: EvaluationLabels = None,
    evaluate: EvaluationFunction = None,
    metric: EvaluationMetric = None,
    evaluation_data: EvaluationData = None,
    confidence: Confidence = None,
    target: options.Target = "default",
    scheme: options.Scheme = "sqnr",
    weight_scheme: options.WeightScheme = "mse",
    override: options.Overrides = None,
    calibration_samples: options.SampleLimit = None,
    sensitivities: Annotated[
        str, typer.Option(help="noise: measured at the outputs; fisher: predicted divergence, by gradients.")
    ] = "noise",
    sensitivity_samples: Annotated[int, typer.Option(min=1, help="Samples that sensitivities are measured on.")] = 64,
    batch_size: options.BatchSize = 8,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    seed: options.Seed = 0,
    name: options.Stem = None,
    encodings_version: options.EncodingsVersion = "1.0.0",
    plain_session: options.PlainSession = None,
    format: options.Formats = None,
    workers: options.Workers = 1,
    cluster: options.Cluster = None,
    quiet: options.Quiet = False,
) -> None:
    """Give each group of layers the bit widths that it needs.

    Writes the network, mixed_precision.json (the front, sensitivities, the assignment) and mixed_precision.html. Exit
    status 1 if the goal isn't reached. Interrupted, the same command goes on from what is finished.
    """
    from bitwright_search.mixed_precision import mixed_precision

    options.check_encodings_version(encodings_version)
    formats = options.read_formats(format)
    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data, evaluation_data)
    if measure and latency is not None:
        raise InputError("give either --latency or --measure")
    overrides = options.read_overrides(override)
    pairs = [part for part in candidates.split(",") if part.strip()]
    asked = any(given is not None for given in (evaluate, labels, metric))
    scored = evaluation_data or data
    scored_on = None if scored is None else options.as_images(scored, images)
    evaluation = read_evaluation(evaluate, labels, scored_on, batch_size, metric) if asked else None
    calibration = options.open_calibration(
        model, data, bank, batch_size=batch_size, limit=calibration_samples, images=images
    )
    with options.shown_progress(quiet=quiet) as progress, options.opened_workers(workers, cluster) as crew:
        table: object = latency
        if measure:
            from bitwright.files import make_directory
            from bitwright_search.latency_measure import measure_latency

            if data is None:
                raise InputError("--measure runs the model: give --data")
            table = measure_latency(model, options.as_images(data, images), sample=options.sample_of(model, data),
                                    candidates=pairs, target=target, overrides=overrides, progress=progress,
                                    out=make_directory(out) / "latency.json")  # fmt: skip
            cost = "latency"
        result = mixed_precision(
            model, calibration, evaluation, sample=options.sample_of(model, data), candidates=pairs,
            allowed_drop=allowed_drop, confidence=confidence, budget=budget, lite=lite, latency=table,
            techniques=recipe,
            cost=cost, solver=solver, sensitivities=sensitivities,  # type: ignore[arg-type]
            sensitivity_samples=sensitivity_samples, target=target, scheme=scheme, weight_scheme=weight_scheme,
            overrides=overrides, seed=seed, batch_size=batch_size, out=out, name=name,
            encodings_version=encodings_version, plain_session=plain_session, formats=formats,
            executor=crew, progress=progress,
        )  # fmt: skip
    _tell(result)


def _tell(result: MixedPrecisionResult) -> None:
    chosen = {s.group: s for s in result.sensitivities if s.candidate == result.assignment[s.group]}
    nats = result.predicted_kl is not None
    alone = "nats alone" if nats else "SQNR alone"
    rows = [
        (group, types, f"{chosen[group].kl:.4g}" if nats else console.decibels(chosen[group].sqnr_db),
         f"{chosen[group].cost:.4g}")
        for group, types in result.assignment.items()
    ]  # fmt: skip
    console.table(("group", "types", alone, "cost"), rows, numbers=(alone, "cost"))
    console.say(str(result))
    for line in result.notes:
        console.say(f"- {line}")
    for path in result.files.values():
        console.say(str(path))
    if not result.met:
        raise CheckFailed("no assignment reaches the goal; the best that was found was exported")
