"""Parts of a simulated dataflow model as functions of some of its weights, with gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Tap, feed
from bitwright.dataflow._layouts import Layout
from bitwright.dataflow._model import FlowModel, M
from bitwright.dataflow._session import FlowSession
from bitwright.dataflow._simulation import FlowSimulation
from bitwright.dataflow._training import TrainableFlow, Trainer, grid_in_training
from bitwright.errors import ModelError
from bitwright.graph import ParamId, TensorId
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Plan

Array = Any
"""An array of the framework."""
Values = Mapping[ParamId, NDArray[np.floating]]


class Differentiator(Trainer, Protocol):
    """What gradients need of a backend beside what training does."""

    def gradient(self, function: Callable[..., Array], /) -> Callable[..., Any]:
        """Of a function to one number, to its first argument."""


class FlowPullback:
    """`bitwright.backend.Pullback`: one compiled program for the outputs, and one for the gradients.

    Args:
        backend: of the model.
        model: the simulated one; its other weights are read at each run.
        encodings: of activations, now.
        params, feeds, taps: see `DifferentiableSimulation.pullback`.
    """

    def __init__(
        self,
        backend: Differentiator,
        model: FlowModel,
        encodings: Mapping[TensorId, Encoding],
        params: Sequence[ParamId],
        feeds: Sequence[TensorId],
        taps: Sequence[TensorId],
    ) -> None:
        self._backend, self._model, self._params, self._taps = backend, model, tuple(params), tuple(taps)
        self._session = FlowSession(backend, model, [Tap(t) for t in taps], feeds)
        made = {t for op in self._session.ops for t in op.outputs} - set(feeds)
        shapes = {t: tuple(n or 1 for n in model.graph.tensors[t].shape or ()) for t in made}
        self._sites = {t: grid_in_training(backend, t, encodings[t], shapes[t]) for t in made if t in encodings}
        read = dict.fromkeys(p for op in self._session.ops for p in op.params.values())
        self._fixed = tuple(p for p in read if p not in params)
        self._run = backend.compile_program(self._outputs)
        self._pull = backend.compile_program(backend.gradient(self._loss))

    def run(self, batch: Batch, values: Values) -> Mapping[TensorId, NDArray[Any]]:
        """See `Pullback`."""
        found = self._run(self._natives(values), self._constants(), self._given(batch))
        return {t: np.asarray(self._backend.numpy(y)) for t, y in zip(self._taps, found, strict=True)}

    def gradients(
        self,
        batch: Batch,
        values: Values,
        cotangents: Callable[[Mapping[TensorId, NDArray[Any]]], Mapping[TensorId, NDArray[Any]]],
    ) -> Mapping[ParamId, NDArray[Any]]:
        """See `Pullback`."""
        outputs = self.run(batch, values)
        pulled = cotangents(outputs)
        weights = {
            _cotangent(t): self._backend.array(np.asarray(pulled.get(t, np.zeros_like(y)), y.dtype))
            for t, y in outputs.items()
        }
        found: Any = self._pull(self._natives(values), self._constants(), {**self._given(batch), **weights})
        return {
            p: np.array(self._layout(p).canonical(np.asarray(self._backend.numpy(found[p]))), np.float32, order="C")
            for p in self._params
        }

    def _outputs(
        self, values: Mapping[str, Array], constants: Mapping[str, Array], given: Mapping[str, Array]
    ) -> list[Array]:
        def rounded(tensor: TensorId, x: Array) -> Array:
            site = self._sites.get(tensor)
            return x if site is None else site.rounded(x, *site.numbers(x, {}, self._backend.array), self._backend)

        with self._backend.namespace.exactly():
            return self._session.computed({**constants, **values}, given, rounded)

    def _loss(self, values: Mapping[str, Array], constants: Mapping[str, Array], given: Mapping[str, Array]) -> Array:
        ns, total = self._backend.namespace, 0.0
        for t, y in zip(self._taps, self._outputs(values, constants, given), strict=True):
            total = total + ns.sum(y * given[_cotangent(t)], tuple(range(len(ns.shape(y) or ()))))
        return total

    def _given(self, batch: Batch) -> dict[str, Array]:
        known = self._model.graph.tensors
        return {t: self._backend.array(feed(batch, t, known[t].dtype, known[t].shape)) for t in self._session.feeds}

    def _constants(self) -> dict[str, Array]:
        return {p: self._model.array(p, self._backend.array) for p in self._fixed}

    def _natives(self, values: Values) -> dict[str, Array]:
        given = {p: np.asarray(values[p], np.float32) for p in self._params}
        return {p: self._backend.array(np.array(self._layout(p).native(v), order="C")) for p, v in given.items()}

    def _layout(self, param: ParamId) -> Layout:
        return self._model.layouts.get(param, Layout())


def _cotangent(tensor: TensorId) -> str:
    return f"{tensor}/cotangent"


class DifferentiableFlowSimulation(FlowSimulation[M], Generic[M]):
    """`DifferentiableSimulation` of a dataflow model."""

    def pullback(self, params: Sequence[ParamId], feeds: Sequence[TensorId], taps: Sequence[TensorId]) -> FlowPullback:
        """See `bitwright.backend.DifferentiableSimulation`; grids are those in force now."""
        quantized = {p for p in self.model.graph.params if p in self.plan.quantized}
        if missing := [p for p in params if p not in quantized]:
            raise ModelError(f"{missing[0]!r} is no parameter that the plan quantizes")
        backend: Any = self.backend
        return FlowPullback(backend, self.model, self._in_force, params, feeds, taps)


class DifferentiableFlow(TrainableFlow):
    """Base, beside `FlowBackend`, of a backend that gives gradients too: `trainable` and `differentiable`."""

    @abstractmethod
    def gradient(self, function: Callable[..., Array]) -> Callable[..., Any]:
        """The gradient of a pure function to one number, to its first argument, as `jax.grad` makes it.

        Args:
            function: of dictionaries of arrays by name.
        """

    def simulate_differentiable(
        self: Any, model: M, plan: Plan, encodings: EncodingTable
    ) -> DifferentiableFlowSimulation[M]:
        """See `bitwright.backend.Differentiable`."""
        return DifferentiableFlowSimulation(self, model, plan, encodings)
