"""The block-by-block walk: spans of the network are learned one after another, each on what those before it make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from bitwright.backend import Capability, Differentiable, DifferentiableSimulation, ParamReader, require
from bitwright.data import CutCache, close_all
from bitwright.errors import InputError, ModelError
from bitwright.graph import OpId, ParamId, TensorId
from bitwright.grids import Encoding
from bitwright.layerwise._base import Finished, Walk, through
from bitwright.progress import stage
from bitwright.technique import Block, LayerResult, Span

Solve = Callable[[Block], Mapping[OpId, LayerResult]]


@dataclass
class BlockwiseWalk(Walk):
    """The `BlockWalk` (see `technique`) over a backend, a model and calibration data."""

    unit = "block"

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
        finished = Finished(self)
        stored = finished.of(o for s in spans for o in s.ops)
        unfinished = [i for i, span in enumerate(spans) if any(o not in stored for o in span.ops)]
        results: dict[OpId, LayerResult] = {}
        # Behind the last unfinished span nothing has to run any more.
        pair = _Pair(self, quantized_inputs, quantized_activations) if unfinished else None
        with ExitStack() as opened:
            opened.enter_context(stage(self.progress, f"Blocks ({self.name})", len(spans)))
            if pair is not None:
                opened.callback(pair.close)
            for index, span in enumerate(spans):
                active = pair if unfinished and index <= unfinished[-1] else None
                if active is not None:
                    active.advance(span.feeds)
                if active is None or all(o in stored for o in span.ops):
                    found = {o: stored[o] for o in span.ops}
                else:
                    found = {o: finished.keep(o, r) for o, r in active.solved(span, solve).items()}
                results |= found
                if active is not None:
                    active.replace(found)
                self.progress.advance(1, span.name)
        return results


class _Pair:
    """The float and the quantized network, at one cut."""

    def __init__(self, walk: BlockwiseWalk, quantized: bool, activations: bool) -> None:
        self.walk, self.quantized = walk, quantized
        encodings = walk.with_activations() if activations else walk.encodings
        assert isinstance(walk.backend, Differentiable)
        self.simulation: DifferentiableSimulation = walk.backend.simulate_differentiable(
            walk.model, walk.plan, encodings
        )
        if not activations:
            walk.bypass_activations(self.simulation)
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
        with ExitStack() as fresh:
            caches = [fresh.enter_context(self._through(i, feeds)) for i in range(2 if self.quantized else 1)]
            self._leave()
            self.caches, self.at = caches, feeds
            fresh.pop_all()

    def _through(self, index: int, wanted: tuple[TensorId, ...]) -> CutCache:
        """The tensors that one of the two networks makes of those at the cut, for every batch."""
        walk, at = self.walk, self.at
        if index:
            session = walk.quantized_session(lambda: self.simulation, at, wanted)
        else:
            session = walk.float_session(at, wanted)
        cache = CutCache(walk.cache_bytes // 3)
        try:
            for batch in walk.batches(None if at is None else self.caches[index]):
                cache.append(through(session, batch, wanted))
        except BaseException:
            cache.close()
            raise
        return cache

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
        caches, self.caches = self.caches, []
        close_all(caches)

    def close(self) -> None:
        """Let what is kept go."""
        with ExitStack() as opened:
            if self.inputs is not None:
                opened.callback(self.inputs.close)
            self._leave()
