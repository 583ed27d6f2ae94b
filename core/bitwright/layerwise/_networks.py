"""The float and the quantized network of a layer-by-layer walk, advancing together from cut to cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Batch, ParamUpdates, PartialExecution, Session, Simulation, Tap
from bitwright.data import CutCache, Dataset
from bitwright.graph import (
    Edit,
    Graph,
    Op,
    OpId,
    ParamId,
    ParamRole,
    SetBias,
    SetParams,
    SplitSharedParam,
    TensorId,
    output_channels,
)
from bitwright.grids import Encoding, EncodingTable
from bitwright.layerwise._cuts import Visit
from bitwright.placement import Plan, SiteId, SiteKind
from bitwright.statistics import LayerMoments
from bitwright.technique import LayerResult


class Networks:
    """The float and the quantized network, advancing from cut to cut.

    Args:
        backend, model, graph, plan, data: of the walk.
        encodings: in force at the start.
        ops: that the walk visits.
        quantized: run the quantized network too.
        activations: and quantize its activations, not just its weights.
        cache_bytes: of tensors at a cut, kept in memory.
    """

    def __init__(
        self,
        backend: Backend[Any],
        model: object,
        graph: Graph,
        plan: Plan,
        data: Dataset,
        encodings: EncodingTable,
        ops: Sequence[Op],
        *,
        quantized: bool,
        activations: bool,
        cache_bytes: int,
    ) -> None:
        self.backend, self.model, self.graph, self.plan, self.data = backend, model, graph, plan, data
        self.ops, self.quantized, self.activations, self.cache_bytes = ops, quantized, activations, cache_bytes
        self.encodings = encodings
        self.simulation: Simulation[Any] | None = None
        self.users = {p: len(graph.users(p)) for p in graph.params}
        # A shared bias is nobody's own: it is split off when one of its ops gets another.
        self.biases = {op.id: b if self.users.get(b := op.params.get(ParamRole.BIAS, "")) == 1 else None for op in ops}
        # What is replaced waits twice: for the edited model, which is made again only where the simulation can't be
        # changed in place, and for that simulation.
        self.edited: object = model
        self.changed: dict[ParamId, NDArray[np.float32]] = {}
        """What `edited` doesn't have yet."""
        self.added: dict[OpId, NDArray[np.float32]] = {}
        """Biases of ops that have none of their own yet."""
        self.params: dict[ParamId, NDArray[np.float32]] = {}
        """What the simulation doesn't have yet."""
        self.installed: dict[SiteId, Encoding] = {}
        self.caches: list[CutCache | None] = [None, None]
        self.start: tuple[TensorId, ...] = graph.inputs

    def replace(self, op: Op, result: LayerResult) -> None:
        """Put a finished layer into the quantized network, so that the next ones see its error."""
        assert op.weight is not None
        self.encodings = self.encodings.merged({op.weight: result.encoding})
        self.installed[op.weight] = result.encoding
        self.params[op.weight] = result.weight
        bias = self.biases[op.id]
        if result.bias is not None and bias is None:
            self.added[op.id] = result.bias
        elif result.bias is not None and bias is not None:
            self.params[bias] = result.bias

    def run(self, visit: Visit, moments: LayerMoments | None, addend: TensorId | None = None) -> None:
        """Stream the layer's inputs into `moments`, and move the cut if the visit says so."""
        needed = [t for t in (visit.op.data_inputs[0], addend) if t is not None]
        wanted = visit.cut if visit.moves else tuple(dict.fromkeys(needed))
        sessions = [self._float_session(visit.start, wanted)]
        if self.quantized:
            sessions.append(self._quantized_session(visit.start, wanted))
        fresh = [CutCache(self.cache_bytes // 2) for _ in sessions]
        try:
            for batches in zip(*(self._batches(i) for i in range(len(sessions))), strict=True):
                seen: list[dict[TensorId, NDArray[Any]]] = []
                for index, (session, batch) in enumerate(zip(sessions, batches, strict=True)):
                    values = _through(session, batch, wanted)
                    if visit.moves:
                        fresh[index].append(values)
                    seen.append(values)
                if moments is not None:
                    moments.update(*(v[needed[0]] for v in seen), *(seen[0][t] - seen[1][t] for t in needed[1:]))
        except BaseException:
            for cache in fresh:
                cache.close()
            raise
        if visit.moves:
            self.close()
            self.caches = [*fresh, None][:2]
            self.start = visit.cut

    def _batches(self, index: int) -> Iterator[Batch]:
        cache = self.caches[index]
        if cache is None:
            return iter(self.data)
        # Shapes are often computed from the model's inputs, which therefore stay at hand behind every cut.
        return ({**inputs, **held} for inputs, held in zip(self.data, cache, strict=True))

    def _float_session(self, feeds: tuple[TensorId, ...], wanted: tuple[TensorId, ...]) -> Session | None:
        taps = [Tap(t) for t in wanted if t not in feeds]
        if not taps:
            return None
        if feeds != self.graph.inputs and isinstance(self.backend, PartialExecution):
            return self.backend.segment(self.model, self._with_inputs(feeds), taps)
        return self.backend.session(self.model, taps)

    def _quantized_session(self, feeds: tuple[TensorId, ...], wanted: tuple[TensorId, ...]) -> Session | None:
        # A model input is quantized at its own site, so that it passes through the session even when it is wanted.
        from_inputs = feeds == self.graph.inputs
        taps = [Tap(t) for t in wanted if from_inputs or t not in feeds]
        if not taps:
            return None
        simulation = self._simulation()
        return simulation.session(taps) if from_inputs else simulation.segment(self._with_inputs(feeds), taps)

    def _with_inputs(self, feeds: tuple[TensorId, ...]) -> tuple[TensorId, ...]:
        return tuple(dict.fromkeys((*feeds, *self.graph.inputs)))

    def _simulation(self) -> Simulation[Any]:
        """The quantized network with all that was replaced; lowered only once where its parameters can be changed."""
        self.changed.update(self.params)
        known = self.simulation
        if not isinstance(known, ParamUpdates) or self.added:
            known = self.simulation = self._lowered(known)
        else:
            known.set_params(self.params)
            known.set(self.installed)
        self.params, self.installed = {}, {}
        return known

    def _lowered(self, known: Simulation[Any] | None) -> Simulation[Any]:
        if isinstance(known, ParamUpdates):
            # One layer gets a bias that it didn't have, so others will: with zeros for now, so that this is done once.
            for op in self.ops:
                shape = self.graph.params[op.weight or ""].shape
                if ParamRole.BIAS not in op.params and self.biases[op.id] is None and op.id not in self.added:
                    self.added[op.id] = np.zeros(output_channels(op, shape), np.float32)
        edits: list[Edit] = [SetParams(self.changed)] if self.changed else []
        for id, bias in self.added.items():
            shared = self.graph.op(id).params.get(ParamRole.BIAS)
            if shared is not None and self.users[shared] > 1:
                edits.append(SplitSharedParam(id, shared))
                self.users[shared] -= 1
            edits.append(SetBias(id, bias))
        if edits:
            self.edited = self.backend.edit(self.edited, edits)
        if self.added:
            graph = self.backend.graph(self.edited)
            self.biases.update((o, graph.op(o).params.get(ParamRole.BIAS)) for o in self.added if o in graph)
        self.changed, self.added = {}, {}
        simulation = self.backend.simulate(self.edited, self.plan, self.encodings)
        if not self.activations:
            simulation.set({s: None for s, site in self.plan.items() if site.kind is SiteKind.ACTIVATION})
        return simulation

    def close(self) -> None:
        """Let what is kept at the cut go."""
        for cache in self.caches:
            if cache is not None:
                cache.close()
        self.caches = [None, None]


def _through(session: Session | None, batch: Batch, wanted: tuple[TensorId, ...]) -> dict[TensorId, NDArray[Any]]:
    outputs = {} if session is None else {tap.tensor: v for tap, v in session.run(batch).items()}
    return {t: outputs[t] if t in outputs else batch[t] for t in wanted}
