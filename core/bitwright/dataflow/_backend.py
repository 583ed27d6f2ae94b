"""The base of a backend for a framework whose models are graphs of pure functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Bundle, Tap, require_params
from bitwright.dataflow import _archive
from bitwright.dataflow._editing import FlowEditor
from bitwright.dataflow._functions import Captured
from bitwright.dataflow._model import Function, M, PutIn
from bitwright.dataflow._namespace import FlowNamespace, NumpyLike, evaluated
from bitwright.dataflow._packing import packed, unpacked
from bitwright.dataflow._rounding import Form, fake_quantized
from bitwright.dataflow._session import FlowSession, Program
from bitwright.dataflow._simulation import FlowSimulation
from bitwright.errors import InputError, ModelError
from bitwright.graph import (
    Edit,
    Formula,
    Graph,
    Op,
    OpId,
    OpKind,
    ParamId,
    ParamRole,
    TensorId,
    formula,
)
from bitwright.grids import EncodingTable
from bitwright.placement import Plan

Array = Any
"""An array of the framework."""


class FlowBackend(ABC, Generic[M]):
    """`Backend`, `PartialExecution` and, in its simulations, `ParamUpdates`.

    A backend gives `name`, `model_type`, `adopt` (what users hold → a model, with a `GraphBuilder`) and, unless the
    models' own `native` holds them, `function`: what an op computes. A framework other than numpy also gives
    `namespace`, `array` and `compile_program`; one whose `native` is no JSON `pack` and `unpack`. All else is here.

    Attributes:
        name: of the backend.
        model_type: of its models.
        namespace: the framework's array functions.
        calls: the framework's functions that files name, by the names that they have there.
        file_format: name and description of the file that `save` writes and `load` opens.
    """

    name: str
    model_type: type[M]
    namespace: FlowNamespace = NumpyLike(np)
    calls: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    file_format: ClassVar[tuple[str, str]] = ("npz", "float graph and parameters")

    # -- what a backend gives

    @abstractmethod
    def adopt(self, model: object, sample: Batch | None = None) -> M:
        """Turn what the user holds into a model; a model as it is."""

    def function(self, model: M, op: Op) -> Function:
        """What an op computes; by default what the model's `native` holds for it."""
        found = model.native.get(op.id)
        if not callable(found):
            raise ModelError(f"the {self.name} backend can't run {op.id!r} ({op.native or op.type})")
        return found  # type: ignore[no-any-return]

    def adds_bias(self, model: M, op: Op) -> bool:
        """Whether the function of a linear op adds the op's bias. Where it doesn't, the base does."""
        roles = getattr(model.native.get(op.id), "roles", None)  # of a captured function, or one from a file
        return roles is None or ParamRole.BIAS in roles

    def compile_program(self, program: Program) -> Program:
        """Make a pure program fast, as `jax.jit` does. Its arguments are dictionaries of arrays by name."""
        return program

    def array(self, x: NDArray[Any]) -> Array:
        """A numpy array as one of the framework's."""
        return x

    def numpy(self, x: Array) -> NDArray[Any]:
        """The other way."""
        return np.asarray(x)

    def rounded(self, x: Array, numbers: tuple[Array, Array, Array], form: Form) -> Array:
        """A tensor on its grid; a kernel may take its place that is bit-equal to `Encoding.fake_quantize`.

        Args:
            x: float32.
            numbers: scale, and the ends of the grid as seen from its zero, in the scale's shape.
            form: the kind of grid.
        """
        return fake_quantized(self.namespace, x, numbers, form)

    def pack(self, model: M, op: Op) -> object:
        """What a file keeps of `model.native[op.id]`: JSON, or bytes. Captured functions are kept by `calls`.

        Raises:
            ModelError: one calls what isn't there.
        """
        kept = model.native[op.id]
        return {"captured": packed(kept, self.calls, op.id)} if isinstance(kept, Captured) else kept

    def unpack(self, stored: Any) -> Any:
        """The other way; lists have become tuples."""
        captured = isinstance(stored, dict) and stored.keys() == {"captured"}
        return unpacked(stored["captured"], self.calls) if captured else stored

    # -- the protocol

    def owns(self, model: object) -> bool:
        """Whether it is one of its models; a backend adds what else it adopts."""
        return isinstance(model, self.model_type)

    def load(self, path: Path, **options: Any) -> M:
        """Open a file that `save` or `export` wrote.

        Raises:
            InputError: it is missing, damaged, or something else.
        """
        return _archive.read(path, self.model_type, self.name, self.unpack)

    def save(self, model: M, path: Path) -> Path:
        """Write one .npz, atomically."""
        return _archive.write(path, model, self.name, lambda op: self.pack(model, op))

    def graph(self, model: M) -> Graph:
        """The canonical graph."""
        return model.graph

    def read(self, model: M, ids: Collection[ParamId]) -> Mapping[ParamId, NDArray[np.float32]]:
        """Copies of parameter values."""
        require_params(model.params, ids)
        return {i: np.array(model.params[i], np.float32, order="C") for i in ids}

    def edit(self, model: M, edits: Sequence[Edit]) -> M:
        """Apply edits, in order, to a copy."""
        editor = FlowEditor(model)
        editor.apply_all(edits)
        return editor.model

    def branch_obstacle(self, model: M, op: OpId) -> str:
        """See `bitwright.backend.Branching`."""
        return FlowEditor(model).branch_obstacle(op)

    def session(self, model: M, taps: Sequence[Tap]) -> FlowSession:
        """The whole model."""
        return FlowSession(self, model, taps)

    def segment(self, model: M, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> FlowSession:
        """A part of it."""
        return FlowSession(self, model, taps, feeds)

    def simulate(self, model: M, plan: Plan, encodings: EncodingTable) -> FlowSimulation[M]:
        """Fake quantization at the plan's sites."""
        return FlowSimulation(self, model, plan, encodings)

    def formats(self) -> Mapping[str, str]:
        """The float artefact."""
        return dict([self.file_format])

    def export(self, model: M, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
        """Write the float model.

        Raises:
            InputError: the format isn't one of `formats`.
        """
        if format not in self.formats():
            raise InputError(f"unknown export format {format!r}; known: {', '.join(self.formats())}")
        return Bundle({"model": self.save(replace(model, encodings={}), path)})

    def input_specs(self, model: M) -> Mapping[TensorId, tuple[tuple[int | None, ...], str]]:
        """Shapes and dtypes of the inputs."""
        tensors = (model.graph.tensors[t] for t in model.graph.inputs)
        return {t.id: (t.shape or (None,), t.dtype) for t in tensors}

    # -- running

    def function_of(self, model: M, op: Op) -> Function:
        """What an op computes in a model as it is now: with activations, branches and biases that edits have put in."""
        kept = model.native.get(op.id)
        if isinstance(kept, Formula):
            ns, spelled = self.namespace, formula(kept.type, self.namespace.functions)
            return lambda inputs, params: [evaluated(ns, spelled, inputs[0])]
        if isinstance(kept, PutIn):
            return self._put_in(kept)
        function = self.function(model, op)
        if ParamRole.BIAS not in op.params or self.adds_bias(model, op):
            return function
        tensor = model.graph.tensors[op.output]
        axis = -1 if op.kind is OpKind.LINEAR else 1 if tensor.channel_axis is None else tensor.channel_axis

        def biased(inputs: Sequence[Array], params: Mapping[ParamRole, Array]) -> Sequence[Array]:
            y, *more = function(inputs, {r: v for r, v in params.items() if r is not ParamRole.BIAS})
            rank = len(self.namespace.shape(y) or ())
            spread = tuple(-1 if i == axis % rank else 1 for i in range(rank))
            return [y + self.namespace.reshape(params[ParamRole.BIAS], spread), *more]

        return biased

    def _put_in(self, kept: PutIn) -> Function:
        def product(inputs: Sequence[Array], params: Mapping[ParamRole, Array]) -> Sequence[Array]:
            y = inputs[0] @ self.namespace.transpose(params[ParamRole.WEIGHT], (1, 0))
            return [y + params[ParamRole.BIAS] if ParamRole.BIAS in params else y]

        return product if kept.what == "product" else lambda inputs, params: [inputs[0] + inputs[1]]
