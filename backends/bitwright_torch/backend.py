"""The PyTorch backend: torch.export captures modules, the captured graph runs with the user's own parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.export import ExportedProgram

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
from bitwright.errors import CapabilityError, InputError, ModelError
from bitwright.graph import Edit, Graph, OpId, ParamId, TensorId
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright_torch.capture.capturing import capture
from bitwright_torch.capture.files import load_exported, load_pt2, run_factory, save_pt2
from bitwright_torch.capture.free_dimensions import DynamicShapes
from bitwright_torch.capture.parts import (
    PartitionedModel,
    capture_parts,
    edit_parts,
    parts_content,
    parts_graph,
    parts_obstacle,
    read_parts,
)
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.content import content
from bitwright_torch.graph.edits import edit_model, obstacle_to_branch
from bitwright_torch.graph.model import CapturedModel, program_of
from bitwright_torch.graph.params import read_params
from bitwright_torch.simulate.parts_session import parts_segment, parts_session
from bitwright_torch.simulate.session import open_session

_IN_PARTS = (
    "the model was captured in parts; no file can hold the Python around them: write each of model.parts by itself"
)
Model = CapturedModel | PartitionedModel


class TorchBackend:
    """`bitwright.backend.Backend` and `PartialExecution` for captured models, whole or in parts."""

    name = "torch"

    def owns(self, model: object) -> bool:
        """Whether an object is a module or an exported program."""
        return isinstance(model, nn.Module | ExportedProgram)

    def load(self, path: Path, **options: Any) -> Model:
        """Open a .pt2 file or a folder of transformers, or run the factory of "model.py:build" and adopt its result.

        Args:
            path: the file or folder, for a factory with a colon and the function's name.
            options: `sample`: for a factory that returns the module only. `inputs`, `dtype`: for a folder, see
                `hf_folder.open_folder`.

        Raises:
            InputError: no such file, not a program, or an unknown option.
            ModelError: the module can't be captured.
            MissingExtraError: a folder, and transformers isn't installed.
        """
        if Path(path).is_dir():
            from bitwright_torch.capture.hf_folder import open_folder

            module, ids, shapes = open_folder(Path(path), **options)
            return self.adopt(module, ids, dynamic_shapes=shapes)
        if unknown := sorted(set(options) - {"sample"}):
            raise InputError(f"the PyTorch backend knows no option {unknown[0]!r}; there is sample")
        if ".py" in str(path) and not str(path).endswith(".pt2"):
            return self.adopt(*run_factory(str(path), options.get("sample")))
        return load_pt2(Path(path))

    def save(self, model: Model, path: Path) -> Path:
        """Write a .pt2 program atomically; training modes aren't kept in it.

        Raises:
            InputError: the file can't be written.
        """
        if isinstance(model, PartitionedModel):
            raise InputError(_IN_PARTS)
        return save_pt2(model, path)

    def adopt(
        self,
        model: object,
        sample: Any = None,
        *,
        dynamic_shapes: DynamicShapes = None,
        modules: Sequence[str] | None = None,
    ) -> Model:
        """Capture a module; a captured model or an exported program is taken as it is.

        Args:
            model: an `nn.Module`; it isn't changed.
            sample: one batch: a tensor or array, a tuple of arguments, or a mapping by argument name.
            dynamic_shapes: see `capturing.capture`.
            modules: names of the submodules to capture, where the Python around them can't be. By default the whole
                module is captured; if that fails, its largest submodules that can be, and a `CaptureNotice` says so.

        Raises:
            InputError: no sample, or it doesn't fit `forward`; `dynamic_shapes` and `modules` together.
            ModelError: the module can't be captured; with the source line and a remedy.
        """
        from bitwright_torch.simulate.simulation import SimulatedModel

        if isinstance(model, SimulatedModel):
            raise InputError("this model is a simulation already: open the float model, or take() the trained one")
        if isinstance(model, CapturedModel | PartitionedModel):
            return model
        if isinstance(model, ExportedProgram):
            return load_exported(model)
        if not isinstance(model, nn.Module):
            raise InputError(f"a {type(model).__name__} is not a PyTorch module")
        if sample is None:
            raise InputError(
                f"{type(model).__name__} needs a sample batch to be captured: QuantSim(model, sample, …), a tensor, a "
                "tuple of arguments, or a mapping by argument name"
            )
        return capture_model(model, sample, dynamic_shapes=dynamic_shapes, modules=modules)

    def graph(self, model: Model) -> Graph:
        """See `Backend`."""
        return parts_graph(model) if isinstance(model, PartitionedModel) else canonical(model).graph

    def fingerprint(self, model: Model) -> str:
        """See `Fingerprinting`."""
        return parts_content(model) if isinstance(model, PartitionedModel) else content(model)

    def read(self, model: Model, ids: Collection[ParamId]) -> Mapping[ParamId, NDArray[np.float32]]:
        """See `Backend`."""
        return read_parts(model, ids) if isinstance(model, PartitionedModel) else read_params(model, ids)

    def edit(self, model: Model, edits: Sequence[Edit]) -> Model:
        """See `Backend`."""
        return edit_parts(model, edits) if isinstance(model, PartitionedModel) else edit_model(model, edits)

    def branch_obstacle(self, model: Model, op: OpId) -> str:
        """See `bitwright.backend.Branching`."""
        return parts_obstacle(model, op) if isinstance(model, PartitionedModel) else obstacle_to_branch(model, op)

    def session(self, model: Model, taps: Sequence[Tap]) -> Session:
        """See `Backend`."""
        return parts_session(model, taps) if isinstance(model, PartitionedModel) else open_session(model, taps)

    def segment(self, model: Model, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """See `PartialExecution`."""
        if isinstance(model, PartitionedModel):
            return parts_segment(model, feeds, taps)
        return open_session(model, taps, feeds)

    def simulate(self, model: Model, plan: Plan, encodings: EncodingTable) -> Simulation[Any]:
        """See `Backend`."""
        return _simulation(model, plan, encodings)

    def simulate_trainable(
        self, model: Model, plan: Plan, encodings: EncodingTable, training: Training
    ) -> TrainableSimulation:
        """See `Trainable`."""
        return _simulation(model, plan, encodings, training)

    def simulate_differentiable(self, model: Model, plan: Plan, encodings: EncodingTable) -> DifferentiableSimulation:
        """See `Differentiable`."""
        if isinstance(model, PartitionedModel):
            raise CapabilityError(
                "a model that was captured in parts isn't differentiated block by block: use gptq or adaround, or give "
                "a model that can be captured whole"
            )
        from bitwright_torch.simulate.simulation import TorchSimulation

        return TorchSimulation(model, plan, encodings)

    def export(self, model: Model, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
        """See `Backend`; of a model in parts, a file for each (see `parts_export`)."""
        if isinstance(model, PartitionedModel):
            from bitwright_torch.export.parts_export import export_parts

            return export_parts(model, plan, encodings, path, format)
        from bitwright_torch.export.export import export

        return export(model, plan, encodings, path, format)

    def observed(self, model: Model, seen: Callable[[Batch], None]) -> nn.Module:
        """See `bitwright.backend.Observable`: a module, called as the user's."""
        from bitwright_torch.simulate.observed import observed

        return observed(model, seen)

    def converting_once(self) -> AbstractContextManager[None]:
        """See `bitwright.backend.SharedConversion`."""
        from bitwright_torch.export.export import converting_once

        return converting_once()

    def formats(self) -> Mapping[str, str]:
        """See `Backend`."""
        from bitwright_torch.export.export import FORMATS

        return dict(FORMATS)

    def input_specs(self, model: Model) -> Mapping[TensorId, tuple[tuple[int | None, ...], str]]:
        """See `Backend`."""
        if isinstance(model, PartitionedModel):
            return copy.copy(model.specs)
        graph = self.graph(model)
        shapes = {t: (graph.tensors[t].shape or (), graph.tensors[t].dtype) for t in graph.inputs}
        computed = [graph.tensors[t].shape for op in graph.ops for t in op.outputs]

        def by_sample() -> bool:
            from bitwright_torch.simulate.samples import turns

            return turns(model, graph, lambda taps: self.session(model, taps))

        return program_of(model).convention.specs(shapes, computed, by_sample)


def _simulation(
    model: Model, plan: Plan, encodings: EncodingTable, training: Training | None = None
) -> TrainableSimulation:
    if isinstance(model, PartitionedModel):
        from bitwright_torch.simulate.parts_simulation import PartitionedSimulation

        return PartitionedSimulation(model, plan, encodings, trainable=training or False)
    from bitwright_torch.simulate.simulation import TorchSimulation

    return TorchSimulation(model, plan, encodings, trainable=training or False)


def capture_model(
    model: nn.Module,
    sample: Any,
    *,
    dynamic_shapes: DynamicShapes = None,
    modules: Sequence[str] | None = None,
) -> Model:
    """Capture a module whole, or in parts (see `TorchBackend.adopt`).

    Raises:
        InputError: the sample doesn't fit `forward`; `dynamic_shapes` and `modules` together.
        ModelError: neither the whole nor any part can be captured.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} is TorchScript, which has no Python that could be captured: give the nn.Module "
            "that it was made from, or export it to ONNX and give that file"
        )
    if modules is not None and dynamic_shapes is not None:
        raise InputError(
            "dynamic_shapes is of the whole model's arguments, and modules= captures parts, each on the inputs that a "
            "run of the sample gives it, with a free batch; leave one of them out"
        )
    if modules is not None:
        return capture_parts(model, sample, modules)
    try:
        return capture(model, sample, dynamic_shapes=dynamic_shapes)
    except ModelError as error:
        if dynamic_shapes is not None or next(model.children(), None) is None:
            raise
        failure = error
    try:
        return capture_parts(model, sample, None, str(failure))
    except ModelError:
        raise failure from None
