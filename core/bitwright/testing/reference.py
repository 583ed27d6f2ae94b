"""A backend in plain numpy: the model that everything is tested on, and what other backends are judged by.

It stands on `bitwright.dataflow` as a third party's does. Its native model is the canonical graph itself, so nothing
needs translating; an adapter for a framework differs in that `adopt` makes the graph of what users hold, and in that
`function` hands out the framework's own functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Bundle, Tap
from bitwright.dataflow import FlowBackend, FlowModel, Function, NumpyLike, rebuild
from bitwright.errors import ModelError
from bitwright.graph import ACTIVATION_TYPES, Op, OpId, TensorId
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright.testing.kernels import compute, supports

__all__ = ["ReferenceBackend", "ReferenceModel", "rebuild"]
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class ReferenceModel(FlowModel):
    """A graph with its numbers; `native` has the permutations of the transposes, which the graph doesn't carry."""

    def __call__(self, batch: Batch) -> dict[TensorId, Array]:
        """Run the model: outputs by name."""
        taps = [Tap(t) for t in self.graph.outputs]
        return {t.tensor: v for t, v in ReferenceBackend().session(self, taps).run(batch).items()}

    @property
    def perms(self) -> Mapping[OpId, tuple[int, ...]]:
        """Permutations of the transposes."""
        return {op: order for op, order in self.native.items() if isinstance(order, tuple)}


class _Numpy(NumpyLike):
    """With the core's own activations."""

    @property
    def functions(self) -> Mapping[str, Any]:
        """All of `ACTIVATION_TYPES`."""
        return {name: activation.compute for name, activation in ACTIVATION_TYPES.items()}


class ReferenceBackend(FlowBackend[ReferenceModel]):
    """Backend + PartialExecution for `ReferenceModel`."""

    name = "reference"
    model_type = ReferenceModel
    namespace = _Numpy(np)

    def adopt(self, model: object, sample: Batch | None = None) -> ReferenceModel:
        """Models come as they are."""
        if not isinstance(model, ReferenceModel):
            raise ModelError(f"the reference backend takes a ReferenceModel, got {type(model).__name__}")
        return model

    def function(self, model: ReferenceModel, op: Op) -> Function:
        """What the kernels compute."""
        if not supports(op):
            raise ModelError(f"the reference backend can't run {op.id!r} ({op.native or op.type})")
        graph, perm = model.graph, model.perms.get(op.id, ())
        return lambda inputs, params: compute(op, graph, tuple(inputs), params, perm)

    def formats(self) -> Mapping[str, str]:
        """The float artefact first."""
        return {**super().formats(), "npz-quantized": "the same with fake quantization in force"}

    def export(self, model: ReferenceModel, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
        """Write the float model ("npz") or the model with its encodings ("npz-quantized")."""
        if format != "npz-quantized":
            return super().export(model, plan, encodings, path, format)
        return Bundle({"qdq": self.save(self.simulate(model, plan, encodings).model, path)})
