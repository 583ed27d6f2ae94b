"""The TensorFlow backend: graphs of sessions, SavedModels, functions and frozen files, rewritten as GraphDefs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Bundle, Session, Simulation, Tap, TrainableSimulation, Training
from bitwright.errors import InputError
from bitwright.graph import Edit, Graph, OpId, ParamId, TensorId
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_onnx.qdq_bundles import QdqBundles
from bitwright_tensorflow.capture import sources
from bitwright_tensorflow.export.freezing import save_frozen, save_saved_model
from bitwright_tensorflow.graph.canonical import recognize
from bitwright_tensorflow.graph.content import content
from bitwright_tensorflow.graph.edits import TfEditor, edit_model
from bitwright_tensorflow.graph.model import Kind, TfModel
from bitwright_tensorflow.graph.params import read_params
from bitwright_tensorflow.simulate.session import open_taps

_OPTIONS = {
    ".pb": {"inputs", "outputs", "constants"},
    ".meta": {"checkpoint", "inputs", "outputs", "constants"},
    "": {"signature", "tags", "constants"},
}


class TensorFlowBackend(QdqBundles):
    """`bitwright.backend.Backend` and `PartialExecution` for TensorFlow graphs."""

    name = "tensorflow"
    qdq_extra = "tensorflow"

    def owns(self, model: object) -> bool:
        """Whether an object is a session, a function, a loaded SavedModel or a GraphDef (Keras models are Keras's)."""
        return sources.owns(model)

    def load(self, path: Path, **options: Any) -> TfModel:
        """Open a SavedModel folder, a frozen .pb, or a .meta with its checkpoint.

        Args:
            path: the file or folder; "saved_model.pb" stands for its folder.
            options: SavedModel: `signature` ("serving_default"), `tags` (("serve",)). Frozen: `inputs`, `outputs`
                (placeholders, and what nothing reads). .meta: `checkpoint` (the prefix; default the same name),
                `inputs` (placeholders), `outputs` (the signature's). All but SavedModels of functions: `constants`
                (values of placeholders that are no data). `sample` isn't needed.

        Raises:
            InputError: no such file, not a model, an unknown option or name.
            ModelError: it can't be loaded.
        """
        path = Path(path)
        options.pop("sample", None)
        path = path.parent if path.name == "saved_model.pb" else path
        form = "" if path.is_dir() else path.suffix.lower()
        if not path.exists():
            raise InputError(f"there is no model {str(path)!r}")
        if form not in _OPTIONS:
            raise InputError(f"{path} is not a TensorFlow model: a SavedModel folder, a .pb or a .meta")
        if unknown := sorted(set(options) - _OPTIONS[form]):
            known = ", ".join(sorted(_OPTIONS[form]))
            raise InputError(f"{path} is opened without the option {unknown[0]!r}; there is {known}")
        if form == "":
            from bitwright_tensorflow.capture.saved_models import SERVE, from_saved_model

            return from_saved_model(
                path, options.get("signature"), options.get("tags", SERVE), options.get("constants")
            )
        if form == ".pb":
            graph_def = sources.read_frozen(path)
            return sources.from_frozen(
                graph_def, options.get("inputs"), options.get("outputs"), str(path), options.get("constants")
            )
        checkpoint = options.get("checkpoint")
        return sources.from_meta(
            path, None if checkpoint is None else Path(checkpoint), options.get("inputs"), options.get("outputs"),
            options.get("constants"),
        )  # fmt: skip

    def save(self, model: TfModel, path: Path) -> Path:
        """Write a .pb (variables frozen), a .meta with its checkpoint, or else a SavedModel folder.

        Raises:
            InputError: it can't be written, or a .meta is wanted of what is no session's graph.
        """
        path = Path(path)
        if path.suffix == ".pb":
            return save_frozen(model, path)
        if path.suffix == ".meta":
            if model.kind is not Kind.SESSION:
                raise InputError(f"a .meta file holds a session's graph; write a {model.kind} as .pb or as a folder")
            from bitwright_tensorflow.export.checkpoints import save_checkpoint

            return save_checkpoint(model, path)
        return save_saved_model(model, path)

    def adopt(self, model: object, sample: Any = None) -> TfModel:
        """What the user holds as a `TfModel` (see `sources.adopt`).

        Raises:
            InputError: outputs or a sample are missing, or name what isn't there.
            ModelError: the model can't be opened.
        """
        return sources.adopt(model, sample)

    def graph(self, model: TfModel) -> Graph:
        """See `Backend`."""
        return recognize(model).graph

    def fingerprint(self, model: TfModel) -> str:
        """See `Fingerprinting`."""
        return content(model)

    def read(self, model: TfModel, ids: Collection[ParamId]) -> Mapping[ParamId, NDArray[np.float32]]:
        """See `Backend`."""
        return read_params(model, ids)

    def edit(self, model: TfModel, edits: Sequence[Edit]) -> TfModel:
        """See `Backend`."""
        return edit_model(model, edits)

    def branch_obstacle(self, model: TfModel, op: OpId) -> str:
        """See `bitwright.backend.Branching`."""
        return TfEditor(model).branch_obstacle(op)

    def session(self, model: TfModel, taps: Sequence[Tap]) -> Session:
        """See `Backend`."""
        return open_taps(model, taps)

    def segment(self, model: TfModel, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """See `PartialExecution`."""
        return open_taps(model, taps, feeds)

    def simulate(self, model: TfModel, plan: Plan, encodings: EncodingTable) -> Simulation[Any]:
        """See `Backend`."""
        from bitwright_tensorflow.simulate.simulation import TfSimulation

        return TfSimulation(model, plan, encodings)

    def simulate_trainable(
        self, model: TfModel, plan: Plan, encodings: EncodingTable, training: Training
    ) -> TrainableSimulation:
        """See `Trainable`."""
        from bitwright_tensorflow.simulate.training import TrainableTfSimulation

        return TrainableTfSimulation(model, plan, encodings, training)

    def export(self, model: TfModel, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
        """See `Backend`."""
        from bitwright_tensorflow.export.export import export

        return export(model, plan, encodings, path, format)

    def formats(self) -> Mapping[str, str]:
        """See `Backend`."""
        from bitwright_tensorflow.export.export import FORMATS

        return dict(FORMATS)

    def observed(self, model: TfModel, seen: Callable[[Batch], None]) -> Any:
        """See `bitwright.backend.Observable`: a v1 session of the whole graph, which can be called too."""
        from bitwright_tensorflow.simulate.observed import observed

        return observed(model, seen)

    def bundled(self, model: TfModel) -> Mapping[str, str]:
        """What an exported bundle holds beside the frozen graph: the source's own form, and QDQ ONNX."""
        from bitwright_tensorflow.export.export import bundled

        return bundled(model)

    def input_specs(self, model: TfModel) -> Mapping[TensorId, tuple[tuple[int | None, ...], str]]:
        """See `Backend`."""
        graph = self.graph(model)
        return {t: (graph.tensors[t].shape or (), graph.tensors[t].dtype) for t in graph.inputs}
