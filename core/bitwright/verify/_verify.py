"""Verify: does the simulation predict what the integer runtime computes? End to end, and tensor by tensor.

Four views of one exported bundle run on the same data: the float model, the simulation, the exact integer
simulation and the integer runtime. Outputs are compared over the whole dataset; the tensors inside on a few samples.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Batch, Bundle, Session, Tap, class_indices
from bitwright.bundle import (
    PAIRS,
    PLAIN,
    QDQ,
    OutputQuality,
    PlainRuntime,
    against_record,
    against_simulation,
    classes_of,
    in_shape,
    over_outputs,
    parts_of,
    plain_session,
    plain_view,
    recorded_inputs,
    reopen,
    whole_of,
)
from bitwright.calibration import full_table
from bitwright.data import DataLike, Dataset, Images, InputSpecs, doubt_of_accuracy, first_samples, is_fixed, samples_in
from bitwright.errors import BitwrightError, CapabilityError, EncodingError, InputError, ModelError, PluginError
from bitwright.graph import Graph
from bitwright.grids import Encoding, EncodingTable
from bitwright.hookspecs import RuntimeInfo
from bitwright.metrics import class_scores
from bitwright.placement import Plan, SiteKind
from bitwright.plugins import registry
from bitwright.progress import Progress, Silent
from bitwright.report import RunReport
from bitwright.runs import of_file
from bitwright.simulation import bias_forms
from bitwright.verify._exactness import Exactness, Examination
from bitwright.verify._integer import IntegerSimulation
from bitwright.verify._result import TensorComparison, Verification, of_parts
from bitwright.verify._runtime_session import RuntimeSession

INSPECTED = 8
"""Samples on which the tensors inside are compared."""

Labels = NDArray[np.integer]


def verify(
    directory: str | Path,
    data: DataLike | None = None,
    labels: Labels | None = None,
    *,
    name: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    inspected: int = INSPECTED,
    float_model: str | Path | None = None,
    runtime: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare the four views of an exported bundle, with each other and with the record of what was simulated.

    The Python between the parts of a model that was captured in parts is in no file. Such an export is compared part
    by part, each on what it was handed when the reference samples ran; "net.head" as `name` takes one part, on data
    for its own inputs.

    Args:
        directory: what `QuantSim.export` or ``bitwright quantize`` wrote.
        data: samples in any accepted form; default: the reference samples that the export carries. The path of a folder
            of images alone is read as the calibration's images were, where the export's report knows; `Images` says
            otherwise.
        labels: class index of each sample, for accuracy of the first output, (samples, classes).
        name: stem of the files, if the directory holds several bundles, or only a part is wanted.
        batch_size, limit: of the data; the first `limit` samples are used.
        inspected: samples for the comparison inside; whole batches where the model fixes their size.
        float_model: the original model, which "float" means at the outputs; default: the one that the run's report
            names, if it is still there unchanged, otherwise the exported model. Inside, it is always the exported one.
        runtime: the integer runtime, "onnxruntime", "tflite" or one of a plugin, if the bundle has what it executes;
            default: that of the target, or else one that there is something for.
        progress: where progress is shown.

    Raises:
        InputError: the directory holds no bundle, or none for that runtime, or the data or labels don't fit.
        MissingExtraError: what the runtime needs isn't installed.
    """
    if parts := parts_of(Path(directory), name):
        if data is not None:
            raise InputError(
                f"the model in {directory} was captured in parts, and no file holds the Python between them, so data "
                "can't be run through it: without data each part is compared on what the record says it was handed; "
                f"with data for its own inputs, choose one as name={parts[0]!r}, {', '.join(map(repr, parts[1:]))}"
            )
        return of_parts({
            part: verify(directory, name=part, batch_size=batch_size, limit=limit, inspected=inspected,
                         runtime=runtime, progress=progress)
            for part in parts
        })  # fmt: skip
    labels = None if labels is None else class_indices(labels, "verify")
    opened = reopen(Path(directory), name)
    if data is None:
        data = recorded_inputs(opened)
        opened.notes.append("no data were given: the samples are those that the export carries")
    if opened.report is not None and (alike := opened.report.read_alike(data)) is not data:
        assert isinstance(alike, Images)
        data = alike
        opened.notes.append(f"images are read as the calibration's were: {alike.options}")
    chosen, told = _choose(opened.bundle, opened.report, runtime)
    artefacts = {info.artefact for info in registry.runtimes().values()} - {chosen.artefact if chosen else ""}
    bundle = replace(opened.bundle, files={k: p for k, p in opened.bundle.files.items() if k not in artefacts})
    opened.notes += told
    backend, model, graph = opened.backend, opened.model, opened.graph
    dataset, left_out = _opened_data(data, backend.input_specs(model), batch_size, limit)
    try:
        table = full_table(opened.plan, opened.table)
    except EncodingError as error:
        return Verification(samples=0, recorded=opened.record is not None, notes=[*left_out, *opened.notes],
                            problems=[*opened.problems, str(error)])  # fmt: skip
    views = _Views(backend, model, graph, opened.plan, table, bundle, chosen)
    original = None if float_model is None else Path(float_model)
    if original is None and not opened.part:
        original = original_model(Path(directory), opened.report)
    reference = model if original is None else backend.load(original)
    wanted = list(graph.outputs)
    ran: tuple[str, ...] = ("simulated", "integer")
    sessions = {view: views.open[view](wanted) for view in ran if view in views.open}
    sessions["float"] = backend.session(reference, [Tap(t) for t in dict.fromkeys(wanted)])
    if views.plain and "integer" in sessions:
        try:
            default = plain_session(bundle, wanted)
        except (InputError, ModelError) as error:
            views.problems.append(f"a default session refuses the export: {error}")
        else:
            sessions |= {} if default is None else {PLAIN: default}
    figures = over_outputs(graph, sessions, dataset, progress or Silent())
    outputs, samples = figures.first, figures.samples
    if labels is not None and len(labels) < samples:
        raise InputError(f"{len(labels)} labels for {samples} samples")
    if labels is not None:
        rows = len(class_scores("labels", outputs["float"], finite=False))  # NaN is told as a problem
        if rows != samples:
            raise InputError(
                f"labels: the first output has {rows} rows for {samples} samples, so that there isn't one class a "
                "sample; verify without labels"
            )
    problems = [*against_record(opened, views.simulation), *views.problems, *figures.problems]
    batches = list(_few(dataset, inspected, backend.input_specs(model), sessions["simulated"]))
    problems += against_simulation(opened, views.simulation, batches[0])
    exact, tensors, exactness = _inside(views, batches)
    problems[:0] = exactness.problems
    plain = plain_view(bundle, wanted, figures, labels)
    problems += [plain.problem] if plain is not None and plain.problem else []
    quality = OutputQuality(graph)
    taps = [t.tensor for t in quality.taps]
    if taps:
        quality.run(views.open["float"](taps), views.open["simulated"](taps), batches)
    problems += [p for p in quality.crushed() if p not in problems]
    by_output = {f.name: f for f in figures.figures()}
    own = by_output[graph.outputs[0]]
    classes = {view: c for view, v in outputs.items() if view != PLAIN and (c := classes_of(v)) is not None}
    if labels is not None and "float" in classes and len(classes["float"]) == samples:
        right = float((classes["float"] == labels[:samples]).mean())
        if doubt := doubt_of_accuracy(right, outputs["float"][0].size, samples):
            opened.notes.append(doubt)
    return Verification(
        samples=samples,
        runtime="" if chosen is None else chosen.name,
        float_model="exported" if original is None else "original",
        accuracy={}
        if labels is None
        else {v: float((c == labels[:samples]).mean()) for v, c in classes.items() if len(c) == samples},
        agreement={k: v for k, v in own.agreement.items() if PLAIN not in PAIRS[k]},
        sqnr_db={k: v for k, v in own.sqnr_db.items() if v is not None and PLAIN not in PAIRS[k]},
        outputs=list(by_output.values()),
        exact=exact,
        plain=plain,
        tensors=tensors,
        uncovered=dict(exactness.uncovered),
        recorded=opened.record is not None,
        notes=[*left_out, *opened.notes, *views.notes],
        problems=list(dict.fromkeys([*opened.problems, *problems])),
    )


def _opened_data(
    data: DataLike, specs: Mapping[str, tuple[tuple[int | None, ...], str]], batch_size: int, limit: int | None
) -> tuple[Dataset, list[str]]:
    """The data, and what was said of samples that are left out."""
    from bitwright.data import open_data

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = open_data(data, specs, batch_size=batch_size, limit=limit)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return dataset, [str(w.message) for w in caught if "left out" in str(w.message)]


def _choose(bundle: Bundle, report: RunReport | None, asked: str | None) -> tuple[RuntimeInfo | None, list[str]]:
    """The integer runtime that a bundle is run on, and what is to be said of the choice.

    That which the user asks for; otherwise the one that it was exported for, one that executes an artefact of its own,
    or the first that executes what there is.

    Raises:
        InputError: there is no such runtime, or the bundle has nothing for it.
    """
    known = registry.runtimes()
    there = [info for info in known.values() if info.artefact in bundle.files]
    if asked is not None:
        if asked not in known:
            try:
                registry.runtime(asked)
            except PluginError as error:
                raise InputError(str(error)) from None
        if known[asked] not in there:
            raise InputError(f"the bundle has nothing for {asked}; export it for a target with that runtime")
        return known[asked], []
    extension = {} if report is None else report.target_config.get("bitwright", {})
    meant = extension.get("runtime") if isinstance(extension, dict) else None
    if isinstance(meant, str) and meant in known and known[meant] in there:
        return known[meant], []
    notes = []
    if isinstance(meant, str) and there:
        gone = "which isn't installed here" if meant not in known else "and has nothing that it executes"
        notes.append(f"the export is for the integer runtime {meant!r}, {gone}: another one is compared")
    own = [info for info in there if info.artefact != QDQ]
    return next(iter([*own, *there]), None), notes


def original_model(directory: Path, report: RunReport | None = None) -> Path | None:
    """The model that a run's report names, if it is still there with the same contents.

    Args:
        directory: of the export.
        report: of the export; default: the folder's `report.json`.
    """
    try:
        named = report.model if report is not None else None
        record = json.loads((directory / "report.json").read_text())["model"] if named is None else named.model_dump()
        path, digest = Path(record["path"]), record["sha256"]
        return path if path.is_file() and of_file(path) == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sqnr(signal: NDArray[Any], noisy: NDArray[Any]) -> float:
    """10·log10(Σ signal² / Σ (noisy − signal)²) in decibels over all elements at once; infinite if equal."""
    reference = np.asarray(signal, np.float64)
    noise = float(np.square(np.asarray(noisy, np.float64) - reference).sum())
    power = float(np.square(reference).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(max(power, 1e-300) / noise))


class _Views:
    """Openers of the four views' sessions; `problems` has why one couldn't be opened."""

    def __init__(
        self,
        backend: Backend[Any],
        model: object,
        graph: Graph,
        plan: Plan,
        table: EncodingTable,
        bundle: Bundle,
        chosen: RuntimeInfo | None,
    ) -> None:
        self.backend, self.graph, self.plan, self.table = backend, graph, plan, table
        self.foreign = None if chosen is None else chosen.arithmetic or None
        self.plain = False
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.simulation = bias_forms.simulate(backend, model, plan, table)
        self.open: dict[str, Callable[[list[str]], Session]] = {
            "float": lambda tensors: backend.session(model, [Tap(t) for t in tensors]),
            "simulated": lambda tensors: self.simulation.session([Tap(t) for t in tensors]),
        }
        self.integer: IntegerSimulation | None = None
        if chosen is None:
            self.notes.append("the export has no quantized artefact: float and simulation are compared only")
            return
        runtime = registry.runtime(chosen.name)
        self.plain = isinstance(runtime, PlainRuntime)
        outputs = list(dict.fromkeys(graph.outputs))
        try:
            of_outputs = RuntimeSession(chosen, runtime, bundle, outputs)
        except (InputError, ModelError) as error:
            self.problems.append(f"the integer runtime refuses the export: {error}")
            return
        self.open["integer"] = lambda tensors: (
            of_outputs if list(dict.fromkeys(tensors)) == outputs else RuntimeSession(chosen, runtime, bundle, tensors)
        )
        try:
            integer = IntegerSimulation(backend, model, graph, table)
        except CapabilityError as error:
            self.notes.append(str(error))
            return
        self.integer = integer
        self.open["exact"] = lambda tensors: integer.session([Tap(t) for t in tensors])


def _inside(views: _Views, batches: list[Batch]) -> tuple[dict[str, float], list[TensorComparison], Exactness]:
    sites = [s for s, x in views.plan.items() if x.kind is SiteKind.ACTIVATION and s in views.table]
    output = views.graph.outputs[0]
    wanted = list(dict.fromkeys([*sites, output]))
    # The exact view first: where it can't be run, nothing is examined against it.
    order = sorted(views.open, key=lambda view: view == "integer")
    sessions = {view: views.open[view](wanted) for view in order}
    held: dict[str, dict[str, list[NDArray[Any]]]] = {view: {} for view in sessions}
    examination = None if views.integer is None else Examination(views.integer, wanted, foreign=views.foreign)
    for batch in batches:
        shapes: dict[str, tuple[int, ...]] = {}
        for view, session in list(sessions.items()):
            try:
                run = {tap.tensor: np.asarray(v) for tap, v in session.run(batch).items()}
            except BitwrightError as error:
                if view != "exact":
                    raise
                views.notes.append(f"the exact integers can't be computed: {error}")
                del sessions[view], held[view]
                examination = None
                continue
            if view == "simulated":
                shapes = {t: v.shape for t, v in run.items()}
            elif view == "integer":
                run = _comparable(views, run, shapes)
            for tensor, v in run.items():
                held[view].setdefault(tensor, []).append(v)
            if view == "integer" and examination is not None:
                examination = _examined(views, examination, batch, run)
    values = {view: {t: whole_of(v) for t, v in tensors.items()} for view, tensors in held.items()}
    compared = [_compare(s, views.table[s], {view: v.get(s) for view, v in values.items()}) for s in sites]
    compared.sort(key=lambda c: (-(c.simulated_differs or 0.0), c.sqnr_db))
    exactness = Exactness() if examination is None else examination.result()
    if views.integer is None or "exact" not in values or output not in values["integer"]:
        return {}, compared, exactness
    exact, runtime = values["exact"][output], values["integer"][output]
    classes = [classes_of(v) for v in (exact, runtime)]
    ops = len(views.integer.integer_ops)
    if runtime.dtype.kind in "OUS":  # strings
        differs = exact != runtime
    else:
        differs = np.abs(exact.astype(np.float64) - runtime) > _rounding(views.table.get(output), runtime)
    figures = {
        "output_differs": float(differs.mean()) if differs.size else 0.0,
        "argmax_agreement": 1.0 if classes[0] is None else float((classes[0] == classes[1]).mean()),
        "integer_ops": ops,
        "float_ops": len(views.graph.ops) - ops,
        "peak_accumulator": max(views.integer.peaks.values(), default=0.0),
    }
    return figures, compared, exactness


def _comparable(
    views: _Views, run: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[Any]]:
    """What a runtime handed out, in the model's shapes; what has another is left out, and told."""
    found: dict[str, NDArray[Any]] = {}
    for tensor, values in run.items():
        shaped = in_shape(values, shapes.get(tensor, values.shape))
        if shaped is not None:
            found[tensor] = shaped
            continue
        told = f"{tensor!r} isn't compared: the runtime has it in another shape than the model"
        views.notes += [told] if told not in views.notes else []
    return found


def _examined(
    views: _Views, examination: Examination, batch: Batch, run: Mapping[str, NDArray[Any]]
) -> Examination | None:
    try:
        examination.add(batch, run)
    except BitwrightError as error:
        views.notes.append(f"the exact integers can't be compared with the runtime: {error}")
        return None
    return examination


def _rounding(encoding: Encoding | None, values: NDArray[Any]) -> float:
    """What two floats may differ by and still be the same number: nothing on a grid, else a few of float32's ulps."""
    if encoding is not None and encoding.is_fixed:
        return 0.0
    return 1e-6 * float(np.abs(values[np.isfinite(values)]).max(initial=0))


def _compare(site: str, encoding: Encoding, views: dict[str, NDArray[Any] | None]) -> TensorComparison:
    real, simulated, runtime = views["float"], views["simulated"], views.get("integer")
    assert real is not None and simulated is not None
    figures: dict[str, Any] = {"name": site, "sqnr_db": sqnr(real, simulated)}
    if runtime is not None and encoding.float_format is None:
        for view in ("simulated", "exact"):
            other = views.get(view)
            if other is not None:
                steps = encoding.steps_between(other, runtime)
                figures[f"{view}_differs"] = float((steps > 0).sum() / max(runtime.size, 1))
                figures[f"{view}_max_steps"] = int(steps.max(initial=0))
    return TensorComparison(**figures)


def _few(dataset: Dataset, samples: int, specs: InputSpecs, session: Session) -> Iterator[Batch]:
    """The first samples, in batches; a batch whose size the model fixes, or a part of which doesn't run, is whole."""
    fixed = is_fixed(specs)
    left = samples
    for batch in dataset:
        if left <= 0:
            return
        part = batch if fixed else first_samples(batch, left)
        if samples_in(part) < samples_in(batch) and not _runs(session, part):
            part = batch
        left -= samples_in(part)
        yield part


def _runs(session: Session, batch: Batch) -> bool:
    """Whether a part of a batch is an input too: where rows are read by index, it need not be."""
    try:
        session.run(batch)
    except BitwrightError:
        return False
    return True
