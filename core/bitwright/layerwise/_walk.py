"""The layer-by-layer walk: each linear op sees the input that the already replaced layers before it produce.

The float and the quantized network advance together through the graph. Between two layers only the tensors
that cross a cut of the graph are kept (in memory up to a budget, else on disk), so that every op runs a bounded
number of times and memory doesn't grow with depth. The schedule of cuts depends on the graph alone: a resumed
run executes the same segments as the first, so that its numbers are bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Batch, ParamReader, ParamUpdates, PartialExecution, Session, Simulation, Tap
from bitwright.data import CACHE_BYTES, CutCache, Dataset
from bitwright.files import Spill
from bitwright.graph import (
    Edit,
    Graph,
    Op,
    OpId,
    OpKind,
    ParamId,
    ParamRole,
    SetBias,
    SetParams,
    SplitSharedParam,
    TensorId,
    groups_of,
    input_channels,
    output_channels,
)
from bitwright.grids import Encoding, EncodingTable
from bitwright.layerwise._cuts import Visit, schedule
from bitwright.layerwise._side_by_side import Solving
from bitwright.layerwise._solving import (
    blocks_within,
    dump,
    layer_of,
    left_at_nearest,
    load,
    name_blocks,
    name_left,
)
from bitwright.placement import Plan, SiteId, SiteKind
from bitwright.progress import Progress, Store
from bitwright.statistics import LayerMoments
from bitwright.technique import LayerResult, LayerwiseSettings, Solve
from bitwright.workers import Workers


@dataclass
class LayerwiseWalk:
    """The real `LayerWalk` (see `technique`) over a backend, a model and calibration data.

    Attributes:
        encodings: current ones; weights of ops not visited stay quantized by these.
        activations: gives the activation encodings when they are first needed.
        store: finished layers are kept here under "layer/<op id>".
        moments_gib: largest moments of a layer, unless a call says otherwise.
        workers: where layers are solved; None solves them here.
        name: what warnings begin with.
    """

    backend: Backend[Any]
    model: Any
    graph: Graph
    plan: Plan
    encodings: EncodingTable
    data: Dataset
    store: Store
    progress: Progress
    activations: Callable[[], EncodingTable] | None = None
    cache_bytes: int = CACHE_BYTES
    moments_gib: float = LayerwiseSettings().moments_gib
    workers: Workers | None = None
    name: str = "layer by layer"
    current: Any = field(init=False)

    def __call__(
        self,
        ops: Sequence[OpId],
        solve: Solve,
        *,
        quantized_inputs: bool = True,
        quantized_activations: bool = True,
        products: bool = True,
        residuals: bool = False,
        moments_gib: float | None = None,
        column_blocks: bool = False,
    ) -> Mapping[OpId, LayerResult]:
        """See `LayerWalk`."""
        budget = self.moments_gib if moments_gib is None else moments_gib
        results: dict[OpId, LayerResult] = {}
        spill = Spill()

        def kept(result: LayerResult) -> LayerResult:
            return replace(result, weight=spill.kept(result.weight))

        stored = {o: kept(r) for o in ops if (r := load(self.store.get(f"layer/{o}"))) is not None}
        visits = schedule(self.graph, ops, partial=self._partial)
        self.current = self.model
        encodings = self.encodings
        if quantized_activations and quantized_inputs and self.activations is not None and len(stored) < len(ops):
            encodings = self.activations()
        self.progress.start("Layers", len(visits))
        pair = _Networks(self, [s.op for s in visits], quantized_inputs, quantized_activations, encodings)
        unfinished = [i for i, s in enumerate(visits) if s.op.id not in stored]
        # A weight that several ops share is settled by the first of them.
        replaced: dict[ParamId, LayerResult] = {}
        solving = Solving(self.graph, self.workers, solve)
        known: tuple[object, LayerMoments] | None = None
        params = ParamReader(self.backend, self.model, self.graph)

        def finish(op: Op, result: LayerResult, *, fresh: bool = True) -> None:
            if fresh:
                result = kept(result)
                self.store.put(f"layer/{op.id}", dump(result))
            results[op.id] = result
            replaced[op.weight or ""] = result
            pair.replace(op, result)
            self.progress.advance(1, op.id)

        try:
            for index, visit in enumerate(visits):
                op, result = visit.op, stored.get(visit.op.id)
                for done in solving.of_weight(op.weight):
                    finish(*done)
                shared = replaced.get(op.weight or "")
                moments, addend, left, reused = None, None, "", False
                if result is None and shared is None:
                    blocks, left = blocks_within(
                        budget, op, self.graph.params[op.weight or ""].shape, self._features(op),
                        encodings.get(op.weight or ""), paired=quantized_inputs, products=products,
                        most=None if column_blocks else 1,
                    )  # fmt: skip
                    if residuals and products and quantized_inputs and blocks == 1:
                        addend = self._addend(visit)
                    # What several layers read (queries, keys and values) is observed once: nothing that is replaced
                    # between them lies before it.
                    same = (op.data_inputs[0], op.kind, op.attrs, self._features(op), blocks)
                    reused = known is not None and known[0] == same and addend is None
                    if reused:
                        assert known is not None
                        moments = known[1]
                    elif blocks:
                        known = None
                        moments = self._moments(visit, quantized_inputs, products, addend is not None, blocks)
                        known = (same, moments) if addend is None else None
                # Behind the last unfinished layer nothing has to run any more.
                observed = None if reused else moments
                if unfinished and index <= unfinished[-1] and (observed is not None or visit.moves):
                    if quantized_inputs:
                        wanted = visit.cut if visit.moves else (op.data_inputs[0], *([addend] if addend else []))
                        for done in solving.before(wanted):
                            finish(*done)
                    pair.run(visit, observed, addend if observed is not None else None)
                if result is not None:
                    finish(op, result, fresh=False)
                elif shared is not None:
                    finish(op, replace(shared, bias=None, figures={"shared": 1.0}))
                else:
                    if moments is None:
                        finish(op, left_at_nearest(params, op, encodings, left))
                        continue
                    for done in solving.solve(layer_of(params, op, moments, encodings)):
                        finish(*done)
            for done in solving.rest():
                finish(*done)
        finally:
            solving.close()
            pair.close()
            self.progress.finish()
        results = {visit.op.id: results[visit.op.id] for visit in visits}
        name_left(self.name, results)
        name_blocks(self.name, results)
        return results

    @cached_property
    def _partial(self) -> bool:
        return isinstance(self.backend, PartialExecution)

    def _addend(self, visit: Visit) -> TensorId | None:
        """The tensor that is added to the layer's output and known before it; None if there is no such sum."""
        op, graph = visit.op, self.graph
        total = graph.sole_consumer(op.output)
        if groups_of(op) > 1 or total is None or total.kind is not OpKind.ADD or len(total.data_inputs) != 2:
            return None
        other = next((t for t in total.data_inputs if t != op.output), None)
        if other is None or other not in visit.cut:
            return None
        shape = graph.tensors[op.output].shape
        return other if shape is not None and shape == graph.tensors[other].shape else None

    def _features(self, op: Op) -> int:
        """K of the op's columns."""
        shape = self.graph.params[op.weight or ""].shape
        kernel = int(np.prod(shape[2:], dtype=np.int64)) if len(shape) > 2 else 1
        return input_channels(op, shape) // groups_of(op) * kernel

    def _moments(self, visit: Visit, paired: bool, products: bool, residual: bool, blocks: int) -> LayerMoments:
        op = visit.op
        axis = self.graph.tensors[op.data_inputs[0]].channel_axis
        outputs = output_channels(op, self.graph.params[op.weight or ""].shape) if residual else 0
        return LayerMoments(
            op, self._features(op), axis, paired=paired, products=products, residual_outputs=outputs, blocks=blocks
        )


class _Networks:
    """The float and the quantized network, advancing from cut to cut."""

    def __init__(
        self, walk: LayerwiseWalk, ops: Sequence[Op], quantized: bool, activations: bool, encodings: EncodingTable
    ) -> None:
        self.walk, self.ops, self.quantized, self.active = walk, ops, quantized, activations
        self.encodings = encodings
        self.simulation: Simulation[Any] | None = None
        own = {
            p for p in walk.graph.params if len(walk.graph.users(p)) == 1
        }  # a shared one is split off when it changes
        self.biases = {op.id: b if (b := op.params.get(ParamRole.BIAS)) in own else None for op in ops}
        self.changed: dict[ParamId, NDArray[np.float32]] = {}
        """What `walk.current` doesn't have yet."""
        self.added: dict[OpId, NDArray[np.float32]] = {}
        self.users = {p: len(walk.graph.users(p)) for p in walk.graph.params}
        self.params: dict[ParamId, NDArray[np.float32]] = {}
        """What the simulation doesn't have yet."""
        self.installed: dict[SiteId, Encoding] = {}
        self.caches: list[CutCache | None] = [None, None]
        self.start: tuple[TensorId, ...] = walk.graph.inputs

    def replace(self, op: Op, result: LayerResult) -> None:
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
        walk = self.walk
        needed = [t for t in (visit.op.data_inputs[0], addend) if t is not None]
        wanted = visit.cut if visit.moves else tuple(dict.fromkeys(needed))
        sessions = [self._float_session(visit.start, wanted)]
        if self.quantized:
            sessions.append(self._quantized_session(visit.start, wanted))
        fresh = [CutCache(walk.cache_bytes // 2) for _ in sessions]
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
            return iter(self.walk.data)
        # Shapes are often computed from the model's inputs, which therefore stay at hand behind every cut.
        return ({**inputs, **held} for inputs, held in zip(self.walk.data, cache, strict=True))

    def _float_session(self, feeds: tuple[TensorId, ...], wanted: tuple[TensorId, ...]) -> Session | None:
        taps = [Tap(t) for t in wanted if t not in feeds]
        if not taps:
            return None
        if feeds != self.walk.graph.inputs and isinstance(self.walk.backend, PartialExecution):
            return self.walk.backend.segment(self.walk.model, self._with_inputs(feeds), taps)
        return self.walk.backend.session(self.walk.model, taps)

    def _quantized_session(self, feeds: tuple[TensorId, ...], wanted: tuple[TensorId, ...]) -> Session | None:
        # A model input is quantized at its own site, so that it passes through the session even when it is wanted.
        from_inputs = feeds == self.walk.graph.inputs
        taps = [Tap(t) for t in wanted if from_inputs or t not in feeds]
        if not taps:
            return None
        simulation = self._simulation()
        return simulation.session(taps) if from_inputs else simulation.segment(self._with_inputs(feeds), taps)

    def _with_inputs(self, feeds: tuple[TensorId, ...]) -> tuple[TensorId, ...]:
        return tuple(dict.fromkeys((*feeds, *self.walk.graph.inputs)))

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
        walk = self.walk
        if isinstance(known, ParamUpdates):
            # One layer gets a bias that it didn't have, so others will: with zeros for now, so that this is done once.
            for op in self.ops:
                shape = walk.graph.params[op.weight or ""].shape
                if ParamRole.BIAS not in op.params and self.biases[op.id] is None and op.id not in self.added:
                    self.added[op.id] = np.zeros(output_channels(op, shape), np.float32)
        edits: list[Edit] = [SetParams(self.changed)] if self.changed else []
        for id, bias in self.added.items():
            shared = walk.graph.op(id).params.get(ParamRole.BIAS)
            if shared is not None and self.users[shared] > 1:
                edits.append(SplitSharedParam(id, shared))
                self.users[shared] -= 1
            edits.append(SetBias(id, bias))
        if edits:
            walk.current = walk.backend.edit(walk.current, edits)
        if self.added:
            graph = walk.backend.graph(walk.current)
            self.biases.update((o, graph.op(o).params.get(ParamRole.BIAS)) for o in self.added if o in graph)
        self.changed, self.added = {}, {}
        simulation = walk.backend.simulate(walk.current, walk.plan, self.encodings)
        if not self.active:
            simulation.set({s: None for s, site in walk.plan.items() if site.kind is SiteKind.ACTIVATION})
        return simulation

    def close(self) -> None:
        for cache in self.caches:
            if cache is not None:
                cache.close()
        self.caches = [None, None]


def _through(session: Session | None, batch: Batch, wanted: tuple[TensorId, ...]) -> dict[TensorId, NDArray[Any]]:
    outputs = {} if session is None else {tap.tensor: v for tap, v in session.run(batch).items()}
    return {t: outputs[t] if t in outputs else batch[t] for t in wanted}
