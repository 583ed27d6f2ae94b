"""The ONNX backend: onnx-ir rewrites models, ONNX Runtime runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.backend import Batch, Bundle, Pair, PickingSession, QuantizedNetwork, Session, Simulation, Tap
from bitwright.bundle import PlainRisks
from bitwright.errors import InputError
from bitwright.files import Array
from bitwright.graph import Edit, Graph, OpId, ParamId, TensorId
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_onnx.capture.model import adopt_model, load_model
from bitwright_onnx.capture.writing import save_model
from bitwright_onnx.graph.attributes import static_dims
from bitwright_onnx.graph.canonical import canonical_graph
from bitwright_onnx.graph.content import content
from bitwright_onnx.graph.edits import OnnxEditor, edit_model
from bitwright_onnx.graph.operands import dtype_name
from bitwright_onnx.graph.params import read_params
from bitwright_onnx.graph.tensors import DATA_FILES
from bitwright_onnx.simulate.session import OrtSession
from bitwright_onnx.simulate.session import segment as segment_session

if TYPE_CHECKING:
    from bitwright_onnx.export.qdq_pairs import QdqContents

_FORMATS = {
    "onnx": "the float model with its updated weights; encodings files go with it",
    "qdq": "the quantized model with QuantizeLinear/DequantizeLinear pairs, for ONNX Runtime and other runtimes",
}


class OnnxBackend:
    """`bitwright.backend.Backend`, `PartialExecution` and `IntegerRuntime` for models of type `onnx_ir.Model`.

    Every model that it is handed must come from its own `load`, `adopt` or `edit`: those bring it into the normal
    form of `bitwright_onnx.capture.normalize`.
    """

    name = "onnx"

    def owns(self, model: object) -> bool:
        """Whether an object is a `ModelProto` or an onnx-ir model."""
        onnx = sys.modules.get("onnx")
        return isinstance(model, ir.Model) or (onnx is not None and isinstance(model, onnx.ModelProto))

    def load(self, path: Path, **options: Any) -> ir.Model:
        """Open a model file.

        Args:
            path: the file.
            options: `custom_ops`: shared libraries with the model's custom ops; `sample` isn't needed.

        Raises:
            InputError: no such file, not an ONNX model, or an unknown option.
            ModelError: the model can't be brought into normal form.
        """
        options.pop("sample", None)
        return load_model(path, custom_ops=_custom_ops(options))

    def save(self, model: ir.Model, path: Path, *, external_data: bool | None = None) -> Path:
        """Write a model atomically; weights go to `<path>.data` on request, and where the file would pass 2 GB.

        Raises:
            InputError: the file can't be written.
        """
        return save_model(model, path, external_data=external_data)

    def adopt(self, model: object, sample: Batch | None = None, **options: Any) -> ir.Model:
        """The backend's own copy of a path, `ModelProto`, its bytes, or onnx-ir model. `sample` isn't needed.

        Raises:
            InputError: not an ONNX model.
            ModelError: the model can't be brought into normal form.
        """
        return adopt_model(model, custom_ops=_custom_ops(options))

    def graph(self, model: ir.Model) -> Graph:
        """See `Backend`."""
        return canonical_graph(model)

    def fingerprint(self, model: ir.Model) -> str:
        """See `Fingerprinting`."""
        return content(model)

    def read(self, model: ir.Model, ids: Collection[ParamId]) -> Mapping[ParamId, NDArray[np.float32]]:
        """See `Backend`."""
        return read_params(model, ids)

    def edit(self, model: ir.Model, edits: Sequence[Edit]) -> ir.Model:
        """See `Backend`."""
        return edit_model(model, edits)

    def branch_obstacle(self, model: ir.Model, op: OpId) -> str:
        """See `bitwright.backend.Branching`."""
        return OnnxEditor(model, self.graph(model)).branch_obstacle(op)

    def session(self, model: ir.Model, taps: Sequence[Tap]) -> Session:
        """See `Backend`."""
        return OrtSession(model, taps, blocked=True)

    def picking_session(self, model: ir.Model, taps: Sequence[Tap]) -> PickingSession:
        """See `bitwright.backend.Picking`: what picks runs over all data."""
        return OrtSession(model, taps, blocked="at once")

    def segment(self, model: ir.Model, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """See `PartialExecution`."""
        return segment_session(model, feeds, taps)

    def simulate(self, model: ir.Model, plan: Plan, encodings: EncodingTable) -> Simulation[Any]:
        """See `Backend`."""
        from bitwright_onnx.simulate.simulation import OnnxSimulation

        return OnnxSimulation(model, self.graph(model), plan, encodings)

    def export(self, model: ir.Model, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
        """See `Backend`."""
        if format == "onnx":
            return Bundle({"model": self.save(model, path)})
        if format == "qdq":
            from bitwright_onnx.export.qdq import write_qdq

            return write_qdq(model, self.graph(model), plan, encodings, path).bundle()
        raise InputError(f"the ONNX backend has no format {format!r}; there are {', '.join(_FORMATS)}")

    def observed(self, model: ir.Model, seen: Callable[[Batch], None]) -> Any:
        """See `bitwright.backend.Observable`: `run(names, feeds)` as of an `onnxruntime.InferenceSession`."""
        from bitwright_onnx.simulate.observed import ObservedSession

        return ObservedSession(model, seen)

    def formats(self) -> Mapping[str, str]:
        """See `Backend`."""
        return dict(_FORMATS)

    def compile(self, bundle: Bundle, taps: Sequence[TensorId] = ()) -> Session:
        """Load an exported bundle's quantized model into ONNX Runtime's integer kernels.

        Raises:
            InputError: the bundle holds no quantized model.
        """
        from bitwright_onnx.export.runtime import compile_bundle

        return compile_bundle(bundle, taps)

    def plain_session(self, bundle: Bundle) -> Session:
        """See `bitwright.bundle._plain.PlainRuntime`.

        Raises:
            InputError: the bundle holds no quantized model.
            ModelError: ONNX Runtime refuses it.
        """
        from bitwright_onnx.export.plain_session import PlainSession

        return PlainSession(_qdq(bundle))

    def plain_risks(self, bundle: Bundle) -> PlainRisks:
        """See `bitwright.bundle._plain.PlainRuntime`.

        Raises:
            InputError: the bundle holds no quantized model.
            ModelError: it can't be read.
        """
        from bitwright_onnx.export.plain_session import risks_of

        return risks_of(_qdq(bundle))

    def keep_exact(self, bundle: Bundle) -> tuple[str, ...]:
        """See `bitwright.bundle._plain.PlainRuntime`.

        Raises:
            InputError: the bundle holds no quantized model, or it can't be written.
            ModelError: it can't be read.
        """
        from bitwright_onnx.export.plain_session import keep_exact

        return keep_exact(_qdq(bundle))

    def host_notes(self) -> tuple[str, ...]:
        """See `bitwright.bundle.HostNotes`."""
        from bitwright_onnx.export.plain_session import host_notes

        return host_notes()

    def open_quantized(self, path: Path) -> QuantizedNetwork:
        """See `bitwright.backend.QuantizedReader`.

        Raises:
            InputError: there is no such file, or it isn't an ONNX model.
        """
        from bitwright_onnx.export.quantized_network import QuantizedFile

        return QuantizedFile(path)

    def source_files(self, model: ir.Model) -> Collection[Path]:
        """See `bitwright.backend.SourceFiles`: where weights outside of the model file lie."""
        return {path for path in model.graph.meta.get(DATA_FILES, ()) if path.is_file()}

    def op_seconds(
        self, bundle: Bundle, ops: Collection[OpId], batches: Sequence[Batch], *, repeats: int = 5, threads: int = 1
    ) -> Mapping[OpId, float]:
        """See `bitwright.backend.OpTimer`.

        Raises:
            InputError: the bundle holds no quantized model, or the runtime refuses a batch.
        """
        from bitwright_onnx.export.op_times import op_times

        return op_times(_qdq(bundle), tuple(ops), batches, repeats=repeats, threads=threads)

    def pairs(self, bundle: Bundle) -> Mapping[TensorId, Sequence[Pair]]:
        """See `QuantizedArtefact`."""
        return self._contents(bundle).pairs

    def floats(self, bundle: Bundle) -> Mapping[ParamId, Callable[[], Array]]:
        """See `QuantizedArtefact`."""
        return self._contents(bundle).floats

    @staticmethod
    def _contents(bundle: Bundle) -> QdqContents:
        from bitwright_onnx.export.qdq_pairs import contents_of

        return contents_of(_qdq(bundle))

    def input_specs(self, model: ir.Model) -> Mapping[TensorId, tuple[tuple[int | None, ...], str]]:
        """See `Backend`; an input of unknown rank has shape (); `data.require_ranks` refuses data for it."""
        return {str(v.name): (static_dims(v) or (), dtype_name(v.dtype)) for v in model.graph.inputs}


def _qdq(bundle: Bundle) -> Path:
    if "qdq" not in bundle.files:
        raise InputError("the bundle holds no quantized model (NAME.qdq.onnx)")
    return bundle.files["qdq"]


def _custom_ops(options: Mapping[str, Any]) -> tuple[str | os.PathLike[str], ...]:
    if unknown := sorted(set(options) - {"custom_ops"}):
        raise InputError(f"the ONNX backend knows no option {unknown[0]!r}; there is custom_ops")
    libraries = options.get("custom_ops", ())
    return (libraries,) if isinstance(libraries, str | os.PathLike) else tuple(libraries)
