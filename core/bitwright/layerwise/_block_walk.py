"""The block-by-block walk: spans of the network are learned one after another, each on what those before it make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitwright.backend import (
    Backend,
    Batch,
    Capability,
    DifferentiableSimulation,
    ParamReader,
    PartialExecution,
    Session,
    Tap,
    require,
)
from bitwright.data import CACHE_BYTES, CutCache, Dataset
from bitwright.errors import InputError, ModelError
from bitwright.files import Spill
from bitwright.graph import Graph, OpId, ParamId, TensorId
from bitwright.grids import Encoding, EncodingTable
from bitwright.layerwise._solving import dump, load
from bitwright.placement import Plan, SiteKind
from bitwright.progress import Progress, Store
from bitwright.technique import Block, LayerResult, Span

Solve = Callable[[Block], Mapping[OpId, LayerResult]]


@dataclass
class BlockwiseWalk:
    """The `BlockWalk` (see `technique`) over a backend, a model and calibration data.

    Attributes:
        encodings: current ones; weights that aren't visited stay quantized by these.
        activations: gives the activation encodings when they are first needed.
        store: finished ops are kept here under "block/<op id>".
        name: of the technique, for messages.
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
    name: str = "block by block"

    def __call__(
        self,
        spans: Sequence[Span],
        solve: Solve,
        *,
        quantized_inputs: bool = True,
        quantized_activations: bool = True,
    ) -> Mapping[OpId, LayerResult]:
        """See `BlockWalk`."""
        require(self.backend, {Capability.DIFFERENTIABLE, Capability.PARTIAL_EXECUTION}, self.name)
        spill = Spill()

        def kept(result: LayerResult) -> LayerResult:
            return replace(result, weight=spill.kept(result.weight))

        stored = {o: kept(r) for s in spans for o in s.ops if (r := load(self.store.get(f"block/{o}"))) is not None}
        unfinished = [i for i, span in enumerate(spans) if any(o not in stored for o in span.ops)]
        results: dict[OpId, LayerResult] = {}
        # Behind the last unfinished span nothing has to run any more.
        pair = _Pair(self, quantized_inputs, quantized_activations) if unfinished else None
        self.progress.start("Blocks", len(spans))
        try:
            for index, span in enumerate(spans):
                active = pair if unfinished and index <= unfinished[-1] else None
                if active is not None:
                    active.advance(span.feeds)
                if active is None or all(o in stored for o in span.ops):
                    found = {o: stored[o] for o in span.ops}
                else:
                    found = {o: kept(r) for o, r in active.solved(span, solve).items()}
                    for op, result in found.items():
                        self.store.put(f"block/{op}", dump(result))
                results |= found
                if active is not None:
                    active.replace(found)
                self.progress.advance(1, span.name)
        finally:
            if pair is not None:
                pair.close()
            self.progress.finish()
        return results


class _Pair:
    """The float and the quantized network, at one cut."""

    def __init__(self, walk: BlockwiseWalk, quantized: bool, activations: bool) -> None:
        self.walk, self.quantized = walk, quantized
        encodings = walk.encodings
        if activations and walk.activations is not None:
            encodings = walk.activations()
        backend: Any = walk.backend
        self.simulation: DifferentiableSimulation = backend.simulate_differentiable(walk.model, walk.plan, encodings)
        if not activations:
            sites = walk.plan.items()
            self.simulation.set({s: None for s, site in sites if site.kind is SiteKind.ACTIVATION})
        self.params = ParamReader(walk.backend, walk.model, walk.graph)
        self.at: tuple[TensorId, ...] | None = None
        """The tensors of the cut; None before the first."""
        self.caches: list[CutCache] = []
        self.inputs: CutCache | None = None

    def replace(self, results: Mapping[OpId, LayerResult]) -> None:
        """Put weights and encodings into the quantized network."""
        weights = {self.walk.graph.op(o).weight or "": r for o, r in results.items()}
        self.simulation.set_params({p: r.weight for p, r in weights.items()})
        self.simulation.set({p: r.encoding for p, r in weights.items()})

    def advance(self, feeds: tuple[TensorId, ...]) -> None:
        """Move both networks to a cut."""
        if feeds == self.at:
            return
        fresh = [self._through(i, feeds) for i in range(2 if self.quantized else 1)]
        self._leave()
        self.caches, self.at = fresh, feeds

    def _through(self, index: int, wanted: tuple[TensorId, ...]) -> CutCache:
        """The tensors that one of the two networks makes of those at the cut, for every batch."""
        session, passed = self._session(index, wanted)
        cache = CutCache(self.walk.cache_bytes // 3)
        try:
            for batch in self._batches(index):
                made = {} if session is None else {tap.tensor: v for tap, v in session.run(batch).items()}
                cache.append({**made, **{t: np.asarray(batch[t]) for t in passed}})
        except BaseException:
            cache.close()
            raise
        return cache

    def _session(self, index: int, wanted: tuple[TensorId, ...]) -> tuple[Session | None, list[TensorId]]:
        """What computes them, and those that pass through. A model input is quantized at its own site."""
        first, backend, inputs = self.at is None, self.walk.backend, self.walk.graph.inputs
        feeds = tuple(dict.fromkeys((*(self.at or ()), *inputs)))
        passed = [t for t in wanted if t in feeds and not (first and index)]
        taps = [Tap(t) for t in wanted if t not in passed]
        if not taps:
            return None, passed
        if first:
            found = backend.session(self.walk.model, taps) if not index else self.simulation.session(taps)
            return found, passed
        assert isinstance(backend, PartialExecution)
        if index:
            return self.simulation.segment(feeds, taps), passed
        return backend.segment(self.walk.model, feeds, taps), passed

    def _batches(self, index: int) -> Iterator[Batch]:
        if self.at is None:
            return iter(self.walk.data)
        # Shapes are often computed from the model's inputs, which therefore stay at hand behind every cut.
        return ({**inputs, **held} for inputs, held in zip(self.walk.data, self.caches[index], strict=True))

    def solved(self, span: Span, solve: Solve) -> Mapping[OpId, LayerResult]:
        """What the technique makes of a span at the present cut.

        Raises:
            InputError: there are no data, or a weight isn't quantized.
            ModelError: a result has another shape, or isn't finite.
        """
        graph, encodings = self.walk.graph, self.simulation.get()
        weights = {graph.op(o).weight or "": o for o in span.ops}
        if missing := [o for p, o in weights.items() if p not in encodings]:
            raise InputError(f"{missing[0]!r}: its weight isn't quantized by the target; exclude the op")
        held: dict[ParamId, Encoding] = {p: encodings[p] for p in weights}
        floats = {p: np.asarray(self.params[p], np.float32) for p in weights}
        feeds = tuple(dict.fromkeys((*span.feeds, *graph.inputs)))
        network = self.simulation.pullback(list(weights), feeds, span.taps)
        inputs, cut = self._inputs(), self.caches[-1]
        with self._through(0, span.taps) as targets:
            if not len(targets):
                raise InputError("the calibration data are empty; give at least one batch")
            block = Block(
                span, floats, held, len(targets), lambda i: {**inputs[i], **cut[i]}, targets.__getitem__, network
            )
            found = solve(block)
        for p, o in weights.items():
            result = found[o]
            if result.weight.shape != floats[p].shape or not np.isfinite(result.weight).all():
                raise ModelError(f"{o!r}: {self.walk.name} found no weight of shape {floats[p].shape} that is finite")
        return {o: found[o] for o in span.ops}

    def _inputs(self) -> CutCache:
        """The model's inputs of every batch, to be read in any order."""
        if self.inputs is None:
            self.inputs = CutCache(self.walk.cache_bytes // 3)
            for batch in self.walk.data:
                self.inputs.append({t: np.asarray(batch[t]) for t in self.walk.graph.inputs})
        return self.inputs

    def _leave(self) -> None:
        for cache in self.caches:
            cache.close()
        self.caches = []

    def close(self) -> None:
        self._leave()
        if self.inputs is not None:
            self.inputs.close()
