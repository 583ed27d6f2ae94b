"""The Keras backend: models are brought into a normal form, run and trained on whichever Keras backend is active."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bitwright.backend import (
    Batch,
    Bundle,
    DifferentiableSimulation,
    Session,
    Simulation,
    Tap,
    TrainableSimulation,
    Training,
)
from bitwright.errors import InputError
from bitwright.graph import Edit, Graph, OpId, ParamId, TensorId
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_keras.capture.files import load_model, save_model
from bitwright_keras.capture.normalize import normalize
from bitwright_keras.graph.canonical import canonical
from bitwright_keras.graph.content import content
from bitwright_keras.graph.edits import KerasEditor, edit_model
from bitwright_keras.graph.model import KerasModel
from bitwright_keras.graph.params import read_params
from bitwright_keras.simulate.session import KerasSession
from bitwright_onnx.qdq_bundles import QdqBundles


class KerasBackend(QdqBundles):
    """`bitwright.backend.Backend` and `PartialExecution` for `KerasModel`s."""

    name = "keras"

    def owns(self, model: object) -> bool:
        """Whether an object is a Keras model."""
        return isinstance(model, KerasModel | keras.Model)

    def load(self, path: Path, **options: Any) -> KerasModel:
        """Open a .keras or .h5 file.

        Args:
            path: the file.
            options: `custom_objects`: the model's own classes by name; `safe_mode`: False lets Lambda layers run
                code that the file holds; `sample`: for a subclassed model that isn't built.

        Raises:
            InputError: no such file, not a Keras model, or an unknown option.
            ModelError: the model can't be brought into normal form.
        """
        if unknown := sorted(set(options) - {"custom_objects", "safe_mode", "sample"}):
            raise InputError(
                f"the Keras backend knows no option {unknown[0]!r}; there are custom_objects, safe_mode and sample"
            )
        return load_model(Path(path), **options)

    def save(self, model: KerasModel, path: Path) -> Path:
        """Write a .keras or .h5 file atomically; plain Keras loads it.

        Raises:
            InputError: the file can't be written.
        """
        return save_model(model, Path(path))

    def adopt(self, model: object, sample: Any = None) -> KerasModel:
        """Bring a copy of a Keras model into normal form.

        Args:
            model: a `keras.Model`; it isn't changed.
            sample: one batch; only needed for a subclassed model that has never been called.

        Raises:
            InputError: not a Keras model.
            ModelError: the model can't be brought into normal form.
        """
        if isinstance(model, KerasModel):
            return model
        if not isinstance(model, keras.Model):
            raise InputError(f"a {type(model).__name__} is not a Keras model")
        return normalize(model, sample)

    def graph(self, model: KerasModel) -> Graph:
        """See `Backend`."""
        return canonical(model).graph

    def fingerprint(self, model: KerasModel) -> str:
        """See `Fingerprinting`."""
        return content(model)

    def read(self, model: KerasModel, ids: Collection[ParamId]) -> Mapping[ParamId, NDArray[np.float32]]:
        """See `Backend`."""
        return read_params(model, ids)

    def edit(self, model: KerasModel, edits: Sequence[Edit]) -> KerasModel:
        """See `Backend`."""
        return edit_model(model, edits)

    def branch_obstacle(self, model: KerasModel, op: OpId) -> str:
        """See `bitwright.backend.Branching`."""
        return KerasEditor(model).branch_obstacle(op)

    def session(self, model: KerasModel, taps: Sequence[Tap]) -> Session:
        """See `Backend`."""
        return KerasSession(model, self.graph(model), taps)

    def segment(self, model: KerasModel, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """See `PartialExecution`."""
        return KerasSession(model, self.graph(model), taps, feeds)

    def simulate(self, model: KerasModel, plan: Plan, encodings: EncodingTable) -> Simulation[Any]:
        """See `Backend`; the simulation's model is a `keras.Model`."""
        from bitwright_keras.simulate.simulation import KerasSimulation

        return KerasSimulation(model, plan, encodings)

    def simulate_trainable(
        self, model: KerasModel, plan: Plan, encodings: EncodingTable, training: Training
    ) -> TrainableSimulation:
        """See `Trainable`."""
        from bitwright_keras.simulate.simulation import KerasSimulation

        return KerasSimulation(model, plan, encodings, trainable=training)

    def simulate_differentiable(
        self, model: KerasModel, plan: Plan, encodings: EncodingTable
    ) -> DifferentiableSimulation:
        """See `Differentiable`."""
        from bitwright_keras.simulate.simulation import KerasSimulation

        return KerasSimulation(model, plan, encodings)

    def export(self, model: KerasModel, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
        """See `Backend`."""
        from bitwright_keras.export.export import export

        return export(model, plan, encodings, path, format)

    def formats(self) -> Mapping[str, str]:
        """See `Backend`."""
        from bitwright_keras.export.export import formats

        return formats()

    def observed(self, model: KerasModel, seen: Callable[[Batch], None]) -> keras.Model:
        """See `bitwright.backend.Observable`: a `keras.Model`; `predict` and `evaluate` run it batch by batch."""
        from bitwright_keras.simulate.observed import ObservedModel

        return ObservedModel(model, seen)

    def bundled(self, model: KerasModel) -> Mapping[str, str]:
        """Formats that an exported bundle has beside the .keras file: name → ending.

        A model that TensorFlow can't trace has Keras files only, with a warning that says why.
        """
        from bitwright_keras.export.export import bundled

        return bundled(model)

    def compile(self, bundle: Bundle, taps: Sequence[TensorId] = ()) -> Session:
        """Load what a bundle has of quantized models: .tflite into LiteRT, otherwise QDQ into ONNX Runtime.

        Raises:
            InputError: the bundle holds neither.
            MissingExtraError: the runtime isn't installed.
        """
        from bitwright_keras.export import litert

        if litert.TFLITE in bundle.files:
            return litert.compile_bundle(bundle, taps)
        if "qdq" not in bundle.files:
            held = ", ".join(bundle.files)
            raise InputError(f"the bundle holds no quantized model (.tflite or .qdq.onnx), only {held}")
        return super().compile(bundle, taps)

    def departures(
        self, model: KerasModel, plan: Plan, encodings: EncodingTable, bundle: Bundle
    ) -> Sequence[tuple[str, str]]:
        """See `ReproducedArtefact`: of a .tflite file.

        Raises:
            BitwrightError: it can't be read, or not be made again.
        """
        from bitwright_keras.export.tflite_check import departures

        return departures(model, plan, encodings, bundle)

    def input_specs(self, model: KerasModel) -> Mapping[TensorId, tuple[tuple[int | None, ...], str]]:
        """See `Backend`."""
        return {t: (model.specs[t].shape, model.specs[t].dtype) for t in model.inputs}
