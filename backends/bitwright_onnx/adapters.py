"""What the ONNX backend does for others: their graphs as ONNX models, QDQ files, and all that is done with these.

A backend whose graphs are complete (`bitwright.graph.NEEDS`) needs no converter of its own:

    class MyBackend(QdqExport, FlowBackend[MyModel]):
        ...
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from bitwright.backend import Backend, Batch, Bundle, LazyValues, Session, Tap, parts_of, session_in_parts
from bitwright.errors import BitwrightError, ModelError, first_line
from bitwright.files import Array
from bitwright.graph import Graph, OpId, ParamId, TensorId
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_onnx.backend import OnnxBackend
from bitwright_onnx.capture.writing import save_model
from bitwright_onnx.emit.emitter import emit, values_equal
from bitwright_onnx.emit.sheet import NotEmittable
from bitwright_onnx.export.known_parameters import with_parameters
from bitwright_onnx.graph.opset import detach_weights
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.qdq_bundles import QdqBundles
from bitwright_onnx.simulate.session import OrtSession

__all__ = [
    "QDQ_FORMAT",
    "NotEmittable",
    "QdqExport",
    "Written",
    "export_qdq",
    "export_written",
    "write_graph",
    "written",
]

QDQ_FORMAT: Mapping[str, str] = {
    "qdq": "the quantized model as ONNX with QuantizeLinear/DequantizeLinear pairs, for integer runtimes",
}
"""For `formats`."""
_PART_BYTES = 2**24
"""Of a large written model that is compared at once: ONNX Runtime has its weights twice."""
_SAMPLES, _SIZE = 2, 32
"""Of the batch that a written model is checked with: samples, and the length of other free dimensions."""


def write_graph(graph: Graph, params: Mapping[ParamId, Array], path: Path | None = None) -> onnx.ModelProto:
    """A canonical graph as an ONNX model, tensors and parameters under their own names.

    Args:
        graph: complete as `bitwright.graph.NEEDS` says.
        params: every parameter's values, in canonical layout.
        path: where to write it too, atomically.

    Raises:
        NotEmittable: ops that can't be written, with the reasons.
        ModelError: onnx.checker refuses the model: the graph's shapes or types contradict themselves.
        InputError: the file can't be written.
    """
    model = emit(graph, params).model
    _check(model)
    if path is not None:
        save_model(model, path)
    return ir.to_proto(model)


def _check(model: ir.Model) -> None:
    """Refuse what onnx.checker does. It copies all weights several times, so that large ones are inputs for it."""
    outline = model.clone()
    detach_weights(outline)
    try:
        onnx.checker.check_model(ir.to_proto(outline), full_check=True)
    except Exception as error:
        raise ModelError(f"the graph makes no valid ONNX model: {first_line(error)}") from error


@dataclass(frozen=True)
class Written:
    """A backend's model as ONNX.

    Attributes:
        model: in the ONNX backend's form.
        names: tensor → its name there, where that isn't its own.
    """

    model: ir.Model
    names: Mapping[TensorId, str]


def written(backend: Backend[Any], model: Any, *, sample: Batch | None = None) -> Written:
    """A backend's model as an ONNX model that was seen to compute the same.

    Every tensor of the graph is compared, in ONNX Runtime and in the backend, on one batch.

    Large parameters are read from `model` when the ONNX model is run or written, one by one.

    Args:
        backend, model: whose.
        sample: feeds for the comparison; None: normal random numbers in the inputs' shapes.

    Raises:
        NotEmittable: ops that can't be written.
        ModelError: the ONNX model is invalid, or computes something else; says which tensor.
    """
    graph = backend.graph(model)
    values = LazyValues({p: partial(_read, backend, model, p) for p in graph.params})
    return written_graph(graph, values, lambda taps: backend.session(model, taps), sample=sample)


def written_graph(
    graph: Graph,
    params: Mapping[ParamId, Array],
    session: Callable[[Sequence[Tap]], Session],
    *,
    sample: Batch | None = None,
    tensors: Collection[TensorId] | None = None,
) -> Written:
    """`written`, of a graph with its parameters' values and what opens a session for some taps; `tensors`: those that
    it has, where the graph has others besides. Large values are taken out of `params` when they are needed, each time
    anew."""
    emitted = emit(graph, params)
    _check(emitted.model)
    made = OnnxBackend().adopt(emitted.model)
    own = graph.tensors if tensors is None else tensors
    _compare(session, graph, own, made, emitted.names, sample if sample is not None else _sample(graph))
    return Written(made, emitted.names)


def _read(backend: Backend[Any], model: Any, param: ParamId) -> Array:
    return np.asarray(backend.read(model, [param])[param])


def _sample(graph: Graph) -> Batch:
    rng = np.random.default_rng(0)
    found = {}
    for name in graph.inputs:
        dtype, shape = graph.tensors[name].dtype, graph.tensors[name].shape or ()
        sizes = [n or (_SIZE if i else _SAMPLES) for i, n in enumerate(shape)]
        whole = not dtype.startswith(("float", "bfloat"))
        array = rng.integers(0, 2, sizes) if whole else rng.normal(size=sizes)
        found[name] = array.astype(dtype if dtype != "bfloat16" else "float32")
    return found


def _compare(
    session: Callable[[Sequence[Tap]], Session],
    graph: Graph,
    tensors: Collection[TensorId],
    made: ir.Model,
    names: Mapping[TensorId, str],
    sample: Batch,
) -> None:
    present = values_of(made.graph)
    twins = {t: names.get(t, t) for t in tensors if names.get(t, t) in present}
    twins = {t: n for t, n in twins.items() if present[n].const_value is None and graph.tensors[t].dtype != "sequence"}
    tapped = session([Tap(t) for t in twins]).run(sample)
    expected = {t: np.asarray(tapped[Tap(t)]) for t in twins}
    wanted = [Tap(n) for n in dict.fromkeys(twins.values())]
    shown = OnnxBackend().graph(made)
    # Packed weights are a copy of all, made for speed.
    config = {"session.disable_prepacking": "1"} if len(parts_of(shown, few=True)) > 1 else {}
    found = session_in_parts(shown, _Made(made, config), wanted, _PART_BYTES).run(sample)
    order = {t: i for i, op in enumerate(graph) for t in op.outputs}
    halves = any(about.dtype in ("float16", "bfloat16") for about in graph.tensors.values())
    other = [
        t
        for t in sorted(twins, key=lambda t: order.get(t, -1))
        if not values_equal(expected[t], np.asarray(found[Tap(twins[t])]), halves=halves)
    ]
    alone = _of_equal_inputs(graph, other, made, twins, expected, sample) if other else {}
    for tensor in other:
        if tensor not in alone or not values_equal(expected[tensor], alone[tensor], halves=halves):
            op = graph.producer(tensor)
            made_by = "a model input" if op is None else f"the output of {op.id!r} ({op.native or op.type})"
            raise ModelError(
                f"not emittable as ONNX: tensor {tensor!r}, {made_by}, has other values in the ONNX model: the op's "
                f"type, attributes or `call` don't say what it computes"
            )


@dataclass(frozen=True)
class _Made:
    """A written model, to be run in parts where it is large."""

    model: ir.Model
    config: Mapping[str, str]

    def session(self, taps: Sequence[Tap]) -> Session:
        """See `Divisible`."""
        return OrtSession(self.model, taps, config=self.config)

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """See `Divisible`."""
        return OrtSession(self.model, taps, feeds=feeds, config=self.config)


def _of_equal_inputs(
    graph: Graph,
    tensors: Sequence[TensorId],
    made: ir.Model,
    twins: Mapping[TensorId, str],
    expected: Mapping[TensorId, Array],
    sample: Batch,
) -> dict[TensorId, Array]:
    """Tensors as their ops compute them in ONNX from the backend's own values; without those for which there are none.

    Deep networks amplify the rounding of their first ops until two right computations have different outputs; an op
    that is right gives the right values of equal inputs. A session takes many ops: those of which none reads another.

    Args:
        tensors: in the graph's order.
    """
    part: dict[TensorId, int] = {}
    for tensor in tensors:
        if graph.producer(tensor) is not None:
            taken = {part.get(t) for t in _inputs(graph, tensor)}
            part[tensor] = next(n for n in itertools.count() if n not in taken)
    computed: dict[TensorId, Array] = {}
    for number in sorted(set(part.values())):
        together = [t for t, n in part.items() if n == number]
        read = dict.fromkeys(t for tensor in together for t in _inputs(graph, tensor) if t in twins)
        feeds = {**sample, **{twins[t]: expected[t] for t in read}}
        try:
            found = OnnxBackend().segment(made, list(feeds), [Tap(twins[t]) for t in together]).run(feeds)
        except BitwrightError:  # one reads what has no name in both
            continue
        computed |= {t: np.asarray(found[Tap(twins[t])]) for t in together}
    return computed


def _inputs(graph: Graph, tensor: TensorId) -> tuple[TensorId, ...]:
    op = graph.producer(tensor)
    return () if op is None else tuple(t for t in op.inputs if t is not None)


def export_qdq(
    backend: Backend[Any],
    model: Any,
    plan: Plan,
    encodings: EncodingTable,
    path: Path,
    *,
    sample: Batch | None = None,
) -> Bundle:
    """Write a backend's model as a QDQ ONNX file: for `Backend.export`.

    Args:
        backend, model: whose.
        plan, encodings: of its sites.
        path: the file.
        sample: as `written` takes it.

    Raises:
        NotEmittable, ModelError: as `written`.
        EncodingError: an encoding that ONNX has no ops for.
        InputError: the file can't be written.
    """
    return export_written(written(backend, model, sample=sample), backend.graph(model), plan, encodings, path)


def export_written(found: Written, graph: Graph, plan: Plan, encodings: EncodingTable, path: Path) -> Bundle:
    """The second half of `export_qdq`: a model as `written` gives it, made of a graph."""
    from bitwright_onnx.export.qdq import write_qdq

    shown = with_parameters(OnnxBackend().graph(found.model), found.model, plan, graph.params)
    return write_qdq(found.model, shown, plan, encodings, path).bundle(found.names)


class QdqExport(QdqBundles):
    """The first base of a backend that writes QDQ files by `export_qdq`, beside the formats of its other base.

    With it the backend has the capabilities `integer_runtime`, `quantized_artefact` and `op_timer`, in ONNX Runtime.
    """

    def export(self: Any, model: Any, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
        """Write a QDQ file, or what the other base writes.

        Raises:
            NotEmittable, ModelError, EncodingError, InputError: as `export_qdq`.
        """
        if format in QDQ_FORMAT:
            return export_qdq(self, model, plan, encodings, path)
        others: Any = super()
        return others.export(model, plan, encodings, path, format)  # type: ignore[no-any-return]

    def formats(self) -> Mapping[str, str]:
        """Those of the other base, and QDQ."""
        others: Any = super()
        return {**others.formats(), **QDQ_FORMAT}

    def op_seconds(
        self, bundle: Bundle, ops: Collection[OpId], batches: Sequence[Batch], *, repeats: int = 5, threads: int = 1
    ) -> Mapping[OpId, float]:
        """See `bitwright.backend.OpTimer`."""
        return OnnxBackend().op_seconds(bundle, ops, batches, repeats=repeats, threads=threads)
