"""Verify: does the simulation predict what the integer runtime computes? End to end, and tensor by tensor.

Four views of one exported bundle run on the same data: the float model, the simulation, the exact integer
simulation and the integer runtime. Outputs are compared over the whole dataset; the tensors inside on a few samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bitwright import registry
from bitwright.artefact import find_bundle, plan_of, read_encodings
from bitwright.backend import Backend, Batch, Bundle, IntegerRuntime, Session
from bitwright.data import Dataset
from bitwright.encoding import Encoding, EncodingTable
from bitwright.errors import CapabilityError, InputError
from bitwright.exactness import Exactness, Examination
from bitwright.fingerprint import of_file
from bitwright.graph import Graph
from bitwright.integer import IntegerSimulation
from bitwright.plain import PlainView, seen_plain
from bitwright.plan import Plan, SiteKind
from bitwright.progress import Silent
from bitwright.ranges import full_table
from bitwright.statistics.base import Tap
from bitwright.technique import Progress

INSPECTED = 8
"""Samples on which the tensors inside are compared."""

Labels = NDArray[np.integer]


class TensorComparison(BaseModel):
    """One quantized tensor, float against simulation and simulation against integers.

    Attributes:
        name: the tensor.
        sqnr_db: signal (float) to quantization noise (simulation) ratio, decibels.
        simulated_differs: share of codes in which the float simulation departs from the integer runtime.
        simulated_max_steps: the largest departure, in grid steps.
        exact_differs, exact_max_steps: the same for the exact integer simulation; None where the runtime fused the
            tensor away.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    sqnr_db: float
    simulated_differs: float | None = None
    simulated_max_steps: int | None = None
    exact_differs: float | None = None
    exact_max_steps: int | None = None


class Verification(BaseModel):
    """The result of `verify`; `model_dump_json()` is what ``bitwright verify --json`` prints.

    Attributes:
        samples: how many were run.
        float_model: "original", or "exported" where the original isn't at hand (its weights may be on their grids).
        accuracy: top-1 as a fraction, of "float", "simulated", "integer"; empty without labels.
        agreement: share of equal argmax: "simulated_float", "integer_float", "integer_simulated".
        sqnr_db: of the outputs: "simulated_float", "integer_float", "integer_simulated" (second is the signal).
        exact: the exact integer simulation against the runtime on the inspected samples: "output_differs" (share of
            output elements), "argmax_agreement", "integer_ops" and "float_ops" (counts), "peak_accumulator" (share of
            int32's range).
        plain: a session with the runtime's default options, as users open it; None where the backend has none.
        tensors: those that differ most first.
        uncovered: ops whose exact integers may differ from the runtime's, with the reason; compared as float.
        problems: what is wrong in words; empty if all is well.
    """

    model_config = ConfigDict(frozen=True)

    samples: int
    float_model: str = "exported"
    accuracy: dict[str, float] = Field(default_factory=dict)
    agreement: dict[str, float] = Field(default_factory=dict)
    sqnr_db: dict[str, float] = Field(default_factory=dict)
    exact: dict[str, float] = Field(default_factory=dict)
    plain: PlainView | None = None
    tensors: list[TensorComparison] = Field(default_factory=list)
    uncovered: dict[str, str] = Field(default_factory=dict)
    problems: list[str] = Field(default_factory=list)


def verify(
    directory: str | Path,
    data: Any,
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
    """Compare the four views of an exported bundle.

    Args:
        directory: what `QuantSim.export` or ``bitwright quantize`` wrote.
        data: samples in any accepted form.
        labels: class index of each sample, for accuracy.
        name: stem of the files, if the directory holds several bundles.
        batch_size, limit: of the data; the first `limit` samples are used.
        inspected: samples for the comparison inside.
        float_model: the original model, which "float" means at the outputs; default: the one that the run's report
            names, if it is still there unchanged, otherwise the exported model. Inside, it is always the exported one.
        runtime: "onnxruntime" or "tflite", where the bundle has a quantized artefact for both; default: the one that
            was exported for the target.
        progress: where progress is shown.

    Raises:
        InputError: the directory holds no bundle, or none for that runtime, or the data or labels don't fit.
        CapabilityError: the backend has no integer runtime.
    """
    bundle = _for_runtime(find_bundle(Path(directory), name), runtime)
    backend, model = _open(bundle)
    from bitwright.data import open_data

    dataset = open_data(data, backend.input_specs(model), batch_size=batch_size, limit=limit)
    graph = backend.graph(model)
    encodings = read_encodings(bundle.files["encodings"], graph)
    plan = plan_of(graph, encodings)
    table = full_table(plan, encodings)
    views = _Views(backend, model, graph, plan, table, bundle)
    original = original_model(Path(directory)) if float_model is None else Path(float_model)
    reference = model if original is None else backend.load(original)
    outputs, samples = _outputs(views, reference, dataset, progress or Silent())
    if labels is not None and len(labels) < samples:
        raise InputError(f"{len(labels)} labels for {samples} samples")
    problems = [f"the {view} output holds NaN or infinity" for view, v in outputs.items() if not np.isfinite(v).all()]
    exact, tensors, exactness = _inside(views, dataset, inspected)
    problems += exactness.problems
    plain = seen_plain(bundle, dataset, outputs, labels, sqnr)
    problems += [plain.problem] if plain is not None and plain.problem else []
    pairs = {"simulated_float": ("simulated", "float"), "integer_float": ("integer", "float"),
             "integer_simulated": ("integer", "simulated")}  # fmt: skip
    classes = {view: v.reshape(len(v), -1).argmax(axis=1) for view, v in outputs.items()}
    return Verification(
        samples=samples,
        float_model="exported" if original is None else "original",
        accuracy={}
        if labels is None
        else {v: float((c == np.asarray(labels)[:samples]).mean()) for v, c in classes.items()},
        agreement={k: float((classes[a] == classes[b]).mean()) for k, (a, b) in pairs.items()},
        sqnr_db={k: sqnr(outputs[b], outputs[a]) for k, (a, b) in pairs.items()},
        exact=exact,
        plain=plain,
        tensors=tensors,
        uncovered=dict(exactness.uncovered),
        problems=problems,
    )


ARTEFACTS: Mapping[str, str] = {"onnxruntime": "qdq", "tflite": "tflite"}
"""What each integer runtime executes, by purpose in a bundle."""

FOREIGN: Mapping[str, str] = {
    "tflite": "LiteRT's kernels requantize in fixed point, the exact view follows ONNX Runtime's"
}
"""Runtimes whose arithmetic the exact integers don't follow."""


def _for_runtime(bundle: Bundle, runtime: str | None) -> Bundle:
    """The bundle without what other runtimes execute."""
    if runtime is None:
        return bundle
    if runtime not in ARTEFACTS:
        raise InputError(f"there is no integer runtime {runtime!r}; there are {', '.join(ARTEFACTS)}")
    wanted = ARTEFACTS[runtime]
    if wanted not in bundle.files:
        raise InputError(f"the bundle has nothing for {runtime}; export it for a target with that runtime")
    others = {v for v in ARTEFACTS.values() if v != wanted}
    return replace(bundle, files={k: p for k, p in bundle.files.items() if k not in others})


def original_model(directory: Path) -> Path | None:
    """The model that a run's report names, if it is still there with the same contents."""
    try:
        record = json.loads((directory / "report.json").read_text())["model"]
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
    """Openers of the four views' sessions."""

    def __init__(
        self, backend: Backend[Any], model: Any, graph: Graph, plan: Plan, table: EncodingTable, bundle: Bundle
    ) -> None:
        if not isinstance(backend, IntegerRuntime):
            raise CapabilityError(f"the {backend.name} backend has no integer runtime to verify against")
        self.backend, self.graph, self.plan, self.table = backend, graph, plan, table
        self.foreign = FOREIGN.get("tflite") if "tflite" in bundle.files else None
        simulation = backend.simulate(model, plan, table)
        self.integer = IntegerSimulation(backend, model, graph, table)
        self.open: dict[str, Callable[[list[str]], Session]] = {
            "float": lambda tensors: backend.session(model, [Tap(t) for t in tensors]),
            "simulated": lambda tensors: simulation.session([Tap(t) for t in tensors]),
            "exact": lambda tensors: self.integer.session([Tap(t) for t in tensors]),
            "integer": lambda tensors: backend.compile(bundle, tensors),
        }


def _open(bundle: Bundle) -> tuple[Backend[Any], Any]:
    path = bundle.files["model"]
    backend = registry.backend_for_path(path)
    return backend, backend.load(path)


def _outputs(
    views: _Views, reference: Any, dataset: Dataset, progress: Progress
) -> tuple[dict[str, NDArray[Any]], int]:
    """The first output of float, simulation and runtime over the dataset."""
    tap = Tap(views.graph.outputs[0])
    sessions = {view: views.open[view]([tap.tensor]) for view in ("simulated", "integer")}
    sessions["float"] = views.backend.session(reference, [tap])
    parts: dict[str, list[NDArray[Any]]] = {view: [] for view in sessions}
    progress.start("Verify", dataset.samples)
    for batch in dataset:
        for view, session in sessions.items():
            parts[view].append(np.asarray(session.run(batch)[tap]))
        progress.advance(len(parts["float"][-1]))
    progress.finish()
    if not parts["float"]:
        raise InputError("there are no data to verify on")
    return {view: np.concatenate(p) for view, p in parts.items()}, sum(map(len, parts["float"]))


def _inside(
    views: _Views, dataset: Dataset, inspected: int
) -> tuple[dict[str, float], list[TensorComparison], Exactness]:
    sites = [s for s, x in views.plan.items() if x.kind is SiteKind.ACTIVATION and s in views.table]
    output = views.graph.outputs[0]
    wanted = list(dict.fromkeys([*sites, output]))
    sessions = {view: views.open[view](wanted) for view in views.open}
    values: dict[str, dict[str, NDArray[Any]]] = {view: {} for view in sessions}
    examination = Examination(views.integer, wanted, foreign=views.foreign)
    for batch in _few(dataset, inspected):
        results = {view: session.run(batch) for view, session in sessions.items()}
        examination.add(batch, {tap.tensor: v for tap, v in results["integer"].items()})
        for view, result in results.items():
            for tap, v in result.items():
                held = values[view].get(tap.tensor)
                values[view][tap.tensor] = np.asarray(v) if held is None else np.concatenate([held, v])
    compared = [_compare(s, views.table[s], {view: v.get(s) for view, v in values.items()}) for s in sites]
    compared.sort(key=lambda c: (-(c.simulated_differs or 0.0), c.sqnr_db))
    exact, runtime = values["exact"][output], values["integer"][output]
    classes = [v.reshape(len(v), -1).argmax(axis=1) for v in (exact, runtime)]
    ops = len(views.integer.integer_ops)
    return (
        {
            "output_differs": float((np.abs(exact - runtime) > _rounding(views.table.get(output), runtime)).mean()),
            "argmax_agreement": float((classes[0] == classes[1]).mean()),
            "integer_ops": ops,
            "float_ops": len(views.graph.ops) - ops,
            "peak_accumulator": max(views.integer.peaks.values(), default=0.0),
        },
        compared,
        examination.result(),
    )


def _rounding(encoding: Encoding | None, values: NDArray[Any]) -> float:
    """What two floats may differ by and still be the same number: nothing on a grid, else a few of float32's ulps."""
    if encoding is not None and encoding.float_format is None:
        return 0.0
    return 1e-6 * float(np.abs(values[np.isfinite(values)]).max(initial=0))


def _compare(site: str, encoding: Encoding, views: dict[str, NDArray[Any] | None]) -> TensorComparison:
    real, simulated, runtime = views["float"], views["simulated"], views["integer"]
    assert real is not None and simulated is not None
    figures: dict[str, Any] = {"name": site, "sqnr_db": sqnr(real, simulated)}
    if runtime is not None and encoding.float_format is None:
        codes = encoding.quantize(runtime)
        for view in ("simulated", "exact"):
            other = views[view]
            if other is not None:
                steps = np.abs(encoding.quantize(other) - codes)
                figures[f"{view}_differs"] = float((steps > 0).mean())
                figures[f"{view}_max_steps"] = int(steps.max(initial=0))
    return TensorComparison(**figures)


def _few(dataset: Dataset, samples: int) -> Iterator[Batch]:
    left = samples
    for batch in dataset:
        if left <= 0:
            return
        part = {k: v[:left] for k, v in batch.items()}
        left -= len(next(iter(part.values())))
        yield part
