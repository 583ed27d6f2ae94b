"""`quant_analyzer`: where quantization hurts in one model, and what to do about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.bundle import OutputQuality
from bitwright.data import DataLike, FirstSamples, doubt_of_accuracy, labels_of
from bitwright.errors import InputError
from bitwright.files import make_directory, write_text
from bitwright.graph import Graph
from bitwright.plugins import registry
from bitwright.progress import Progress, Store, shows_progress
from bitwright.report import plan_widths
from bitwright.runs import RunDirectory, identity, run_in
from bitwright.simulation import QuantSim, open_store
from bitwright_analysis.accumulators import accumulators, overflowing
from bitwright_analysis.advice import Evidence, advice, sentence
from bitwright_analysis.distributions import activation_distributions, parameter_distributions
from bitwright_analysis.family_types import family_types
from bitwright_analysis.hints import hints_of
from bitwright_analysis.imbalance import imbalances
from bitwright_analysis.layer_errors import layer_errors
from bitwright_analysis.records import Advice, Analysis, Overall, Sensitivity
from bitwright_analysis.scoring import Evaluation, Judge, OutputNoise, Top1, decibels
from bitwright_analysis.sweeps import Switches, measured, ranked, sweep, units

DIRECTIONS = ("alone", "without")


@shows_progress
def quant_analyzer(
    model: Any,
    data: DataLike,
    evaluate: Callable[[Any], Any] | None = None,
    *,
    labels: Any = None,
    out: str | Path | None = None,
    name: str | None = None,
    sample: Any = None,
    recipe: Sequence[str] = ("fold_batch_norm",),
    sweep_by: str = "sqnr",
    directions: Collection[str] = DIRECTIONS,
    sweep_samples: int | None = 128,
    accumulator_bits: int = 32,
    larger_is_better: bool = True,
    batch_size: int = 8,
    limit: int | None = None,
    run: RunDirectory | str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Analysis:
    """Find out which sites and layers cost accuracy, how, and what helps.

    A `QuantSim` is analysed as it is (calibrated on `data` first if it isn't); it is not changed. A model is opened,
    gets the techniques of `recipe`, and is calibrated.

    Args:
        model: a model, a path, or a `QuantSim`.
        data: samples in any accepted form; ranges and errors are taken on all of them.
        evaluate: the native (simulated) model → a score. Overall figures have it, and with `sweep_by` "evaluate" the
            sensitivities. Without it everything rests on the outputs' SQNR.
        labels: class indices of the samples; an evaluation by top-1 of the first output, in place of `evaluate`.
        out: folder for `analysis.json` and `analysis.html` (needs the extra "report"); None writes nothing.
        name: of the model, in titles; default: its file's stem or its type.
        sample: one batch, for frameworks that trace a model.
        recipe: techniques to apply first, by name; only for a model.
        sweep_by: "sqnr" (fast, and fine enough to tell similar layers apart) or "evaluate".
        directions: "alone" (one unit quantized at a time), "without" (all but one), or both.
        sweep_samples: sensitivities by SQNR use only the first so many samples; None takes all.
        accumulator_bits: width of the target's accumulators, to check for overflow.
        larger_is_better: of the evaluation; False for a loss or a perplexity.
        batch_size, limit: of the data.
        run: where finished measurements are kept, so that the same call goes on after an interruption; default: the
            simulation's own, or `.run` in `out`. An `evaluate` that has changed is asked again, as far as
            `evaluation_identity` sees it.
        progress: where progress is shown; default: as bars on a terminal, nowhere else.
        options: of `QuantSim`, for a model: target, weights, activations, scheme, overrides, seed, ….

    Raises:
        InputError: an argument, the data or an evaluation's result can't be used.
        ModelError: the model can't be opened.
        MissingExtraError: `out` is given, but Bokeh isn't installed.
    """
    _check(sweep_by, directions, evaluate, labels, accumulator_bits)
    if out is not None:
        from bitwright_analysis.plots import require_bokeh

        require_bokeh()
    sim = opened(model, sample, options, progress)
    dataset = sim.open(data, batch_size=batch_size, limit=limit)
    classes = None if labels is None else labels_of(labels, dataset, limit=limit, fixed=sim.fixed_batch)
    seconds: dict[str, float] = {}
    with _run_directory(run, out, sim) as directory:
        sim.attach(run=directory)
        with _clock(seconds, "prepare"):
            applied = _prepare(sim, model, recipe, dataset)
        settings = {
            "evaluate": identity(evaluate),
            "labels": None if labels is None else np.asarray(labels).tolist(),
        }
        table = sim.table
        simulation = sim.backend.simulate(sim.native, sim.plan, table)
        switches = Switches(simulation, sim.plan, table)
        score: Judge | None = Evaluation(evaluate) if evaluate is not None else None
        if classes is not None:
            score = Top1(sim.graph, dataset, classes)
        store = open_store(sim.state, "quant_analyzer", {**settings, "sweep_samples": sweep_samples}, table, dataset)
        with _clock(seconds, "overall"), OutputNoise(sim.backend, sim.native, sim.graph, dataset) as noise:
            figures = _overall(switches, noise, score, store)
        by_score = score if sweep_by == "evaluate" else None
        first = FirstSamples(dataset, None if by_score is not None else sweep_samples, sim.fixed_batch)
        with _clock(seconds, "sensitivities"):
            rows, measure = _sensitivities(sim, switches, by_score, first, store, directions, larger_is_better)
        switches.all_but(())
        quality = OutputQuality(sim.graph)
        taps = quality.taps
        if taps:
            quality.run(sim.backend.session(sim.native, taps), simulation.session(taps), first)
        crushed = tuple(quality.crushed())
        with _clock(seconds, "layers"):
            errors = layer_errors(sim.backend, sim.native, simulation, sim.graph, sim.plan, dataset, sim.progress)
        with _clock(seconds, "distributions"):
            encodings = dict(table)
            parameters = parameter_distributions(sim.graph, sim.plan, encodings, sim.params)
            activations = activation_distributions(
                sim.backend, sim.native, sim.graph, sim.plan, encodings, dataset, sim.progress
            )
        with _clock(seconds, "family"):
            family = family_types(sim, first)
        imbalance = imbalances(sim.graph, table, sim.params)
        sums = accumulators(sim.graph, table, sim.params)
        overall = tuple(Overall(setting=k, score=s, sqnr_db=decibels(n or 0.0)) for k, (n, s) in figures.items())
        evidence = Evidence(
            sim.graph,
            {o.setting: o for o in overall},
            rows,
            errors,
            parameters,
            activations,
            imbalance,
            sums,
            accumulator_bits,
            applied,
            registry.techniques(),
            crushed,
            family,
        )
        doubted = () if labels is None else _doubts(sim.graph, overall, len(labels))
        analysis = Analysis(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            name=name or _name(sim, model),
            target=sim.target.name,
            measure=measure,
            samples=dataset.samples,
            sweep_samples=first.samples,
            recipe=applied,
            overall=overall,
            sensitivities=tuple(rows),
            layers=tuple(errors),
            parameters=tuple(parameters),
            activations=tuple(activations),
            imbalance=tuple(imbalance),
            accumulators=tuple(sums),
            hints=hints_of(sim.graph, sim.target, sim.params, table),
            advice=(*doubted, *advice(evidence)),
            widths=plan_widths(sim.plan),
            crushed=crushed,
            verdict=sentence(evidence),
            family=family,
            layer_names={op.id: own for op in sim.graph if (own := sim.graph.layer_name(op.id)) != op.id},
            seconds={k: round(v, 3) for k, v in seconds.items()},
        )
        if out is not None:
            analysis = write(analysis, out)
    return analysis


def _doubts(graph: Graph, overall: Sequence[Overall], samples: int) -> tuple[Advice, ...]:
    """That a top-1 is one of guessing, if it is."""
    found = next((o.score for o in overall if o.setting == "float"), None)
    shape = graph.tensors[graph.outputs[0]].shape
    classes = 0 if shape is None or None in shape[1:] else math.prod(d or 0 for d in shape[1:])
    doubt = "" if found is None else doubt_of_accuracy(found, classes, samples)
    return (Advice(text=f"{doubt[0].upper()}{doubt[1:]}."),) if doubt else ()


def write(analysis: Analysis, out: str | Path) -> Analysis:
    """Write `analysis.json` and `analysis.html`, each atomically; the result names them.

    Raises:
        InputError: the folder can't be written.
        MissingExtraError: Bokeh isn't installed.
    """
    from bitwright_analysis.analysis_page import render

    folder = make_directory(out)
    named = analysis.model_copy(update={"files": {"json": "analysis.json", "html": "analysis.html"}})
    text = render(named)
    write_text(folder / "analysis.json", named.model_dump_json() + "\n")
    write_text(folder / "analysis.html", text)
    return named


def opened(model: Any, sample: Any, options: Mapping[str, Any], progress: Progress | None) -> QuantSim:
    """A simulation of our own: a copy of the user's, or a new one.

    Raises:
        InputError: options are given for a simulation that has its own.
    """
    if isinstance(model, QuantSim):
        if options or sample is not None:
            given = ", ".join([*options, *(["sample"] if sample is not None else [])])
            raise InputError(f"{given}: a QuantSim has these already; leave them out, or give the model itself")
        return model.fork().attach(progress=progress)
    return QuantSim(model, sample, progress=progress, **options)


def _check(
    sweep_by: str, directions: Collection[str], evaluate: object, labels: NDArray[Any] | None, accumulator_bits: int
) -> None:
    if sweep_by not in ("sqnr", "evaluate"):
        raise InputError(f"sweep_by={sweep_by!r}: sensitivities are by 'sqnr' or by 'evaluate'")
    if sweep_by == "evaluate" and evaluate is None and labels is None:
        raise InputError("sweep_by='evaluate' needs `evaluate` or `labels`")
    if evaluate is not None and labels is not None:
        raise InputError("give `evaluate` or `labels`, not both")
    if not directions or set(directions) - set(DIRECTIONS):
        raise InputError(f"directions={tuple(directions)}: choose 'alone', 'without' or both")
    overflowing([], accumulator_bits)


def _prepare(sim: QuantSim, model: Any, recipe: Sequence[str], dataset: Any) -> tuple[str, ...]:
    if not isinstance(model, QuantSim):
        for technique in recipe:
            sim.apply(technique, dataset)
    roots = (*sim.plan.activations, *sim.plan.parameters)
    if not roots:
        raise InputError(
            f"the target {sim.target.name} quantizes nothing in this model, so there is nothing to analyse"
        )
    if any(site not in sim.encodings for site in roots):
        sim.calibrate(dataset)
    return tuple(technique for technique, _ in sim.reports)


def _sensitivities(
    sim: QuantSim,
    switches: Switches,
    score: Judge | None,
    data: FirstSamples,
    store: Store,
    directions: Collection[str],
    larger_is_better: bool,
) -> tuple[list[Sensitivity], str]:
    """The units ranked by the score, or by output noise on the samples for sensitivities; and the measure's name."""
    switched = units(sim.graph, sim.plan)
    with ExitStack() as stack:
        noise = None if score is not None else OutputNoise(sim.backend, sim.native, sim.graph, data)
        judge: Judge = score if noise is None else stack.enter_context(noise)  # type: ignore[assignment]
        found = sweep(switches, judge, switched, store, sim.progress, directions)
        ends = {
            "float": frozenset[str](),
            "quantized": switches.weights | switches.activations | switches.biases,
        }
        reference, quantized = (measured(switches, judge, f"sweep/{judge.name}/{k}", ends[k], store) for k in ends)
    return ranked(switched, found, judge, reference, quantized, larger_is_better=larger_is_better), judge.name


def _overall(
    switches: Switches, noise: OutputNoise, score: Judge | None, store: Store
) -> dict[str, tuple[float | None, float | None]]:
    """(relative noise, score) of the four settings."""
    everything = switches.weights | switches.activations | switches.biases
    settings = {
        "float": frozenset[str](),
        "weights only": switches.weights,
        "activations only": switches.activations,
        "quantized": everything,
    }
    found: dict[str, tuple[float | None, float | None]] = {}
    for setting, sites in settings.items():
        stored = store.get(f"overall/{setting}")
        if stored is None:
            switches.only(sites)
            values = [noise(switches.simulation), *([] if score is None else [score(switches.simulation)])]
            stored = {"values": np.array(values)}
            store.put(f"overall/{setting}", stored)
        ratio, *rest = stored["values"].tolist()
        found[setting] = ratio, rest[0] if rest else None
    return found


@contextmanager
def _run_directory(
    run: RunDirectory | str | Path | None, out: str | Path | None, sim: QuantSim
) -> Iterator[RunDirectory | None]:
    """The user's, opened by path, the simulation's, or the one in `out`; only what is opened here is closed."""
    if run is None:
        run = sim.run
    if isinstance(run, RunDirectory):
        yield run
        return
    if run is None:
        if out is None:
            yield None
            return
        with run_in(Path(out)) as directory:
            yield directory
            directory.finish()
        return
    with RunDirectory(run) as directory:
        try:
            yield directory
            directory.finish()
        except BaseException:
            directory.discard_if_empty()
            raise


@contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - begin


def _name(sim: QuantSim, model: Any) -> str:
    if sim.source is not None:
        return sim.source.stem
    return type(model).__name__ if not isinstance(model, QuantSim) else "model"
