"""`auto_quantize`: from a float model and an allowed drop to the quantized network that meets it, or the best there is.

Stages, each run once and stored: prepare (batch-norm folding) and validate; evaluate the float model, weights alone and
activations alone; calibration schemes; then every technique that takes part, in its order, each on top of the best
network so far; last, more bits at as few sites as are enough. The first network within the allowed drop ends the
search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.bundle import Formats
from bitwright.calibration import scheme as calibration_scheme
from bitwright.errors import InputError, ModelError
from bitwright.grids import PerTensor
from bitwright.progress import Progress, shows_progress
from bitwright.runs import RunDirectory
from bitwright.simulation import QuantSim, RecipeLike
from bitwright.verify import Validation, validate
from bitwright.workers import lent
from bitwright_search.auto_advice import advise
from bitwright_search.auto_result import AutoQuantResult
from bitwright_search.auto_search import SCHEMES, WIDE, AutoSearch, Limits
from bitwright_search.drops import Allowance
from bitwright_search.evaluation import Mode, Score, read_evaluate
from bitwright_search.exporting import refuse_unwritable, write
from bitwright_search.participants import split_steps
from bitwright_search.scores import Scale, metric_of
from bitwright_search.spending import spend
from bitwright_search.stages import SearchStore, open_sim, run_of

if TYPE_CHECKING:
    from bitwright.data import Dataset


@shows_progress
def auto_quantize(
    model: Any,
    calibration: Any,
    evaluate: Any,
    *,
    allowed_drop: float,
    confidence: float | None = None,
    target: Any = None,
    weights: str | None = None,
    activations: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    sample: Any = None,
    backend: str | None = None,
    seed: int | None = None,
    schemes: Sequence[str | tuple[str, str]] | None = None,
    techniques: RecipeLike = None,
    wider: bool = True,
    batch_size: int = 8,
    out: str | Path | None = None,
    name: str | None = None,
    encodings_version: str = "1.0.0",
    plain_session: bool | None = None,
    formats: Formats | None = None,
    run: RunDirectory | str | Path | None = None,
    budget_seconds: float | None = None,
    budget_evaluations: int | None = None,
    executor: object = None,
    progress: Progress | None = None,
) -> AutoQuantResult:
    """Quantize a model so that it loses no more than `allowed_drop`; otherwise return the best that was found.

    Args:
        model: a framework's model, a path, or a `QuantSim` (whose settings then hold).
        calibration: calibration data in any form that `QuantSim.open` takes.
        evaluate: a function from the native simulated model to a number, higher is better, or to a numpy array with
            one for each sample, whose mean counts; or ``(data, labels)`` for top-1. For an executor of processes it
            must be picklable.
        allowed_drop: largest loss against the float model, in the unit of `evaluate` (top-1: 0.01 is one point).
        confidence: probability, at least 0.5, with which the drop must be within it on other samples like those
            evaluated: the upper bound of the paired difference, by Student's t over samples, is what counts. 0.5 is the
            drop on these samples alone. Default: 0.95 of perplexity and kl, 0.5 of everything else.
        target, weights, activations, overrides, sample, backend, seed: as `QuantSim` takes them.
        schemes: calibration schemes of activations to try, or pairs of (activations, weights); default: those of
            `auto_search.SCHEMES`, for activations of 16 bits and more `sqnr` alone, which keeps their whole range.
        techniques: a recipe to try step by step, in place of the registered techniques that take part.
        wider: whether activations may have 16 bits and weights 8 in the end, where the target runs that and they buy
            most, at as few sites as the allowed drop asks for.
        batch_size: samples a batch, for data that are arrays or files.
        out: where the best network is exported to, with a report and a diagnosis; None exports nothing.
        name: stem of the exported files; default: the model file's, or "model".
        encodings_version: schema of the encodings file.
        plain_session, formats: as `QuantSim.export` takes them.
        run: where finished stages are kept, to go on after a crash; default ``out/.run``, or nowhere without `out`.
        budget_seconds: no stage begins after so much work, earlier processes included.
        budget_evaluations: no more calls of `evaluate` than this, at least 2.
        executor: where independent networks (references, calibration schemes) are evaluated and independent layers
            solved, as `workers.open_workers` takes it: a number of processes, "local:N" or the address of a Dask
            scheduler, a Dask client, any `concurrent.futures.Executor`. Networks travel as paths, so its workers need
            the same file system.
        progress: where progress is shown; default: as bars on a terminal, nowhere else.

    Raises:
        InputError: an argument or the data can't be used, or not one network could be calibrated and evaluated.
        ModelError: the model can't be opened.
        PluginError: an unknown technique.
    """
    _check(allowed_drop, budget_seconds, budget_evaluations, name)
    options = {"target": target, "weights": weights, "activations": activations, "overrides": overrides,
               "backend": backend, "seed": seed}  # fmt: skip
    preparations, steps = split_steps(techniques)
    validation = None if isinstance(model, QuantSim) else _validated(model, sample, options)
    with run_of(run, out) as directory, lent(executor) as workers:
        sim = open_sim(model, sample, options, directory, progress, workers)
        refuse_unwritable(sim, out, model, name, formats)
        data = sim.open(calibration, batch_size=batch_size)
        scored = read_evaluate(evaluate, sim)
        allowance = Allowance.of(allowed_drop, confidence, scored)
        search = AutoSearch(
            sim,
            data,
            scored,
            SearchStore(directory),
            Limits(allowance, budget_seconds, budget_evaluations),
            _schemes(schemes, sim),
            preparations,
            steps,
            workers,
        )
        search.run()
        if wider:
            spend(search)
        best = search.best
        result = _result(search, validation, data)
        best.built.sim.attach(run=run if isinstance(run, RunDirectory) else None, executor=None)
        if out is not None:
            from bitwright_search.auto_page import render

            write(result, render, Path(out), name, model, data, scored, encodings_version, plain_session,
                  formats, tool="auto_quantize", document="diagnosis")  # fmt: skip
    return result


def _check(allowed: float, seconds: float | None, evaluations: int | None, name: str | None) -> None:
    if not allowed >= 0:
        raise InputError(f"allowed_drop={allowed}: give the largest loss that is good enough, 0 or more")
    if seconds is not None and not seconds > 0:
        raise InputError(f"budget_seconds={seconds}: give a positive number")
    if evaluations is not None and evaluations < 2:
        raise InputError(f"budget_evaluations={evaluations}: the float model and one network need 2")
    if name is not None and (not name or Path(name).name != name):
        raise InputError(f"name={name!r} can't be a file name; use a plain stem such as 'mobilenet'")


def _validated(model: Any, sample: Any, options: Mapping[str, Any]) -> Validation:
    asked = {k: options[k] for k in ("target", "weights", "activations", "backend") if options[k] is not None}
    found = validate(model, sample, **asked)
    if not found.opened:
        raise ModelError(found.error)
    return found


def _schemes(given: Sequence[str | tuple[str, str]] | None, sim: QuantSim) -> list[tuple[str, str]]:
    if given is not None:
        pairs = [(s, "minmax") if isinstance(s, str) else (s[0], s[1]) for s in given]
        if not pairs:
            raise InputError("schemes is empty; name at least one, such as 'sqnr'")
    elif _activation_bits(sim) >= WIDE:
        pairs = list(dict.fromkeys(("sqnr", w) for _, w in SCHEMES))
    else:
        pairs = list(SCHEMES)
    for name in {n for pair in pairs for n in pair}:
        calibration_scheme(name)
    return pairs


def _activation_bits(sim: QuantSim) -> int:
    widths = [spec.bits for s in sim.plan.activations if (spec := sim.plan.spec(s)) is not None]
    return max(set(widths), key=widths.count, default=32)


def _result(search: AutoSearch, validation: Validation | None, data: Dataset) -> AutoQuantResult:
    best, sim = search.best, search.best.built.sim
    scores = {m: _value(search.diagnosis.get(m)) for m in (Mode.WEIGHTS, Mode.ACTIVATIONS)}
    lost, allowance = search.lost(best.result), search.limits.allowance
    specs = [sim.plan.spec(op.weight) for op in sim.graph.linear_ops if op.weight is not None]
    advice = advise(
        float_score=search.float_score,
        score=best.score,
        allowed_drop=allowance.drop,
        met=search.met,
        lost=lost,
        confidence=allowance.confidence,
        weights_only=scores[Mode.WEIGHTS],
        activations_only=scores[Mode.ACTIVATIONS],
        trials=search.trials,
        stopped=search.stopped,
        samples=data.samples,
        per_channel=not any(s is not None and isinstance(s.granularity, PerTensor) for s in specs),
        activation_bits=_activation_bits(sim),
        widened=any(t.kind == "types" and t.score is not None for t in search.trials),
        in_float=0 if validation is None else len(validation.unknown),
        scale=Scale(metric_of(search.evaluate)),
    )
    if search.stages.unsaved:
        advice += (f"Networks couldn't be saved, so a crash repeats them: {search.stages.unsaved}",)
    return AutoQuantResult(
        sim=sim,
        score=best.score,
        float_score=search.float_score,
        met=search.met,
        allowed_drop=allowance.drop,
        margin=lost.margin,
        confidence=allowance.judged(lost),
        best=best.name,
        steps=best.steps,
        metric=metric_of(search.evaluate),
        wider=dict(best.wider),
        trials=tuple(search.trials),
        weights_only=scores[Mode.WEIGHTS],
        activations_only=scores[Mode.ACTIVATIONS],
        findings=() if validation is None else _findings(validation),
        advice=advice,
        seconds=search.stages.clock.total,
        evaluations=search.evaluations,
        target=sim.target.name,
    )


def _value(score: Score | None) -> float | None:
    return None if score is None else score.value


def _findings(found: Validation) -> tuple[str, ...]:
    lines = [f"{found.ops} ops, {found.sites} quantized sites", *found.notices]
    lines += [f"{f.where}: {f.what}" + (f" ({f.source})" if f.source else "") for f in found.unknown]
    if found.in_float:
        lines.append(f"{len(found.in_float)} further sites stay in float, such as {found.in_float[0].where}: "
                     f"{found.in_float[0].what}")  # fmt: skip
    return (*lines, *found.notes)
