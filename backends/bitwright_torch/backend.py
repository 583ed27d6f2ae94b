"""The PyTorch backend: torch.export captures modules, the captured graph runs with the user's own parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.export import ExportedProgram

from bitwright.backend import Bundle, Session, Simulation, Training
from bitwright.edits import Edit
from bitwright.encoding import EncodingTable
from bitwright.errors import InputError
from bitwright.graph import Graph, ParamId, TensorId
from bitwright.plan import Plan
from bitwright.statistics.base import Tap
from bitwright_torch.canonical import canonical
from bitwright_torch.capture import DynamicShapes, capture
from bitwright_torch.edits import edit_model
from bitwright_torch.files import load_exported, load_factory, load_pt2, save_pt2
from bitwright_torch.model import CapturedModel
from bitwright_torch.params import read_params
from bitwright_torch.session import open_session


class TorchBackend:
    """`bitwright.backend.Backend` and `PartialExecution` for models of type `CapturedModel`."""

    name = "torch"

    def owns(self, model: object) -> bool:
        """Whether an object is a module or an exported program."""
        return isinstance(model, nn.Module | ExportedProgram)

    def load(self, path: Path, **options: Any) -> CapturedModel:
        """Open a .pt2 file, or run the factory of "model.py:build".

        Args:
            path: the file, for a factory with a colon and the function's name.
            options: `sample`: for a factory that returns the module only.

        Raises:
            InputError: no such file, not a program, or an unknown option.
            ModelError: the module can't be captured.
        """
        if unknown := sorted(set(options) - {"sample"}):
            raise InputError(f"the PyTorch backend knows no option {unknown[0]!r}; there is sample")
        if ".py" in str(path) and not str(path).endswith(".pt2"):
            return load_factory(str(path), options.get("sample"))
        return load_pt2(Path(path))

    def save(self, model: CapturedModel, path: Path) -> Path:
        """Write a .pt2 program atomically; training modes aren't kept in it.

        Raises:
            InputError: the file can't be written.
        """
        return save_pt2(model, path)

    def adopt(
        self, model: object, sample: Any = None, *, dynamic_shapes: DynamicShapes = None
    ) -> CapturedModel:
        """Capture a module; a captured model or an exported program is taken as it is.

        Args:
            model: an `nn.Module`; it isn't changed.
            sample: one batch: a tensor or array, a tuple of arguments, or a mapping by argument name.
            dynamic_shapes: see `capture.capture`.

        Raises:
            InputError: no sample, or it doesn't fit `forward`.
            ModelError: the module can't be captured; with the source line and a remedy.
        """
        if isinstance(model, CapturedModel):
            return model
        if isinstance(model, ExportedProgram):
            return load_exported(model)
        if not isinstance(model, nn.Module):
            raise InputError(f"a {type(model).__name__} is no PyTorch module")
        if sample is None:
            raise InputError(
                f"{type(model).__name__} needs a sample batch to be captured: QuantSim(model, sample, …), a tensor, a "
                "tuple of arguments, or a mapping by argument name"
            )
        return capture(model, sample, dynamic_shapes=dynamic_shapes)

    def graph(self, model: CapturedModel) -> Graph:
        """The canonical graph."""
        return canonical(model).graph

    def read(self, model: CapturedModel, ids: Collection[ParamId]) -> Mapping[ParamId, NDArray[np.float32]]:
        """Parameter values in canonical layout.

        Raises:
            ModelError: an id names no float parameter.
        """
        return read_params(model, ids)

    def edit(self, model: CapturedModel, edits: Sequence[Edit]) -> CapturedModel:
        """A new model with the edits applied in order; unchanged tensors share memory.

        Raises:
            ModelError: an edit can't be carried out; the model given is as it was.
        """
        return edit_model(model, edits)

    def session(self, model: CapturedModel, taps: Sequence[Tap]) -> Session:
        """Prepare the float model to hand out these tensors.

        Raises:
            ModelError: a tap is unknown.
        """
        return open_session(model, taps)

    def segment(self, model: CapturedModel, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """Prepare only what lies between `feeds` and `taps`.

        Raises:
            ModelError: a tap can't be computed from the feeds alone.
        """
        return open_session(model, taps, feeds)

    def simulate(
        self, model: CapturedModel, plan: Plan, encodings: EncodingTable, *, trainable: bool | Training = False
    ) -> Simulation[Any]:
        """Put fake quantization at the plan's sites."""
        from bitwright_torch.simulation import TorchSimulation

        return TorchSimulation(model, plan, encodings, trainable=trainable)

    def export(
        self, model: CapturedModel, plan: Plan, encodings: EncodingTable, path: Path, format: str
    ) -> Bundle:
        """Write one of `formats()` at `path`.

        Raises:
            InputError: unknown format, or the file can't be written.
        """
        from bitwright_torch.export import export

        return export(model, plan, encodings, path, format)

    def formats(self) -> Mapping[str, str]:
        """Export formats: name → description."""
        from bitwright_torch.export import FORMATS

        return dict(FORMATS)

    def input_specs(self, model: CapturedModel) -> Mapping[TensorId, tuple[tuple[int | None, ...], str]]:
        """Shape (None: free) and dtype of each tensor input."""
        graph = self.graph(model)
        return {t: (graph.tensors[t].shape or (), graph.tensors[t].dtype) for t in graph.inputs}
