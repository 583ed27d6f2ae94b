"""``bitwright auto``: model, data and an allowed drop in; the quantized network that meets it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.cli import console, options
from bitwright.errors import CheckFailed
from bitwright_search.evaluation_options import (
    Confidence,
    EvaluationData,
    EvaluationFunction,
    EvaluationLabels,
    EvaluationMetric,
    read_evaluation,
)

if TYPE_CHECKING:
    from bitwright_search.auto_result import AutoQuantResult


def auto(
    *,
    model: options.Model,
    allowed_drop: Annotated[
        float,
        typer.Option(help="Largest loss, in the evaluation's unit; of top-1, 0.01 is one point.", show_default=False),
    ],
    out: options.OutputFolder,
    data: options.CalibrationSource = None,
    bank: options.Bank = None,
    labels: EvaluationLabels = None,
    evaluate: EvaluationFunction = None,
    metric: EvaluationMetric = None,
    evaluation_data: EvaluationData = None,
    confidence: Confidence = None,
    target: options.Target = "default",
    weights: options.WeightType = None,
    activations: options.ActivationType = None,
    override: options.Overrides = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Techniques to try in this order (default: all that take part).", show_default=False),
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(help="Calibration schemes to try, as a,b,c.", show_default=False)
    ] = None,
    wider: Annotated[bool, typer.Option(help="Spend 16-bit activations and 8-bit weights where it takes them.")] = True,
    calibration_samples: options.SampleLimit = None,
    batch_size: options.BatchSize = 8,
    image_scaling: options.ImageScaling = None,
    image_fit: options.ImageFit = None,
    image_bgr: options.ImageBgr = False,
    image_size: options.ImageSize = None,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Begin no stage after so much work.", show_default=False)
    ] = None,
    budget_evaluations: Annotated[
        int | None, typer.Option(min=2, help="Evaluate at most so often.", show_default=False)
    ] = None,
    workers: options.Workers = 1,
    cluster: options.Cluster = None,
    seed: options.Seed = 0,
    name: options.Stem = None,
    encodings_version: options.EncodingsVersion = "1.0.0",
    plain_session: options.PlainSession = None,
    format: options.Formats = None,
    quiet: options.Quiet = False,
) -> None:
    """Quantize a model so that it loses no more than an allowed drop.

    Tries calibration schemes, techniques and last more bits at a few sites until one network is good enough, exports
    the best, and writes diagnosis.html.
    Exit status 1 if none was good enough. Interrupted, the same command goes on from the last finished stage.
    """
    from bitwright_search.auto_quantize import auto_quantize

    options.check_encodings_version(encodings_version)
    formats = options.read_formats(format)
    images = options.image_options(image_scaling, image_fit, image_bgr, image_size, data, evaluation_data)
    scored = evaluation_data or data
    evaluation = read_evaluation(
        evaluate, labels, None if scored is None else options.as_images(scored, images), batch_size, metric
    )
    calibration = options.open_calibration(
        model, data, bank, batch_size=batch_size, limit=calibration_samples, images=images
    )
    with options.shown_progress(quiet=quiet) as progress, options.opened_workers(workers, cluster) as crew:
        result = auto_quantize(
            model, calibration, evaluation, sample=options.sample_of(model, data), allowed_drop=allowed_drop,
            confidence=confidence, target=target, weights=weights, activations=activations,
            overrides=options.read_overrides(override), seed=seed,
            schemes=schemes.split(",") if schemes else None, techniques=recipe, wider=wider,
            batch_size=batch_size, out=out, name=name, encodings_version=encodings_version, plain_session=plain_session,
            formats=formats, budget_seconds=budget_seconds, budget_evaluations=budget_evaluations, executor=crew,
            progress=progress,
        )  # fmt: skip
    _tell(result)


def _tell(result: AutoQuantResult) -> None:
    from bitwright_search.scores import Scale

    scale = Scale(result.metric)
    rows = [
        (t.name, t.status.value, "" if t.score is None else scale.text(t.score),
         "" if t.score is None else scale.drop(result.float_score - t.score, t.margin), f"{t.seconds:.1f}")
        for t in result.trials
    ]  # fmt: skip
    columns = ("trial", "outcome", result.metric, "drop", "seconds")
    console.table(columns, rows, numbers=columns[2:])
    console.say(str(result))
    if result.wider:
        console.say(
            f"more bits at {len(result.wider)} sites: " + ", ".join(f"{s}={t}" for s, t in result.wider.items())
        )
    for line in result.advice:
        console.say(f"- {line}")
    for path in result.files.values():
        console.say(str(path))
    if not result.met:
        raise CheckFailed(
            f"no network is within a drop of {scale.drop(result.allowed_drop)}; the best, {result.best}, loses "
            f"{scale.drop(result.drop, result.margin)} and was exported"
        )
