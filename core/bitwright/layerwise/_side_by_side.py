"""The layers of a walk that are being solved: here, one after another, or on workers while the walk goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bitwright.graph import Graph, Op, OpId, ParamId, TensorId
from bitwright.layerwise._solving import solution
from bitwright.technique import Layer, LayerResult, Solve
from bitwright.workers import Flight, Workers, sendable

Done = tuple[Op, LayerResult]


class Solving:
    """Layers that are being solved. Whoever asks for one gets it and whatever else is done by then, to be finished.

    Args:
        graph: of the walk.
        workers: None solves each layer when it comes; so does a solver that can't travel to them (a closure).
        solve: see `technique.Solve`.
    """

    def __init__(self, graph: Graph, workers: Workers | None, solve: Solve) -> None:
        self.graph, self.solver = graph, solve
        self.width = workers.width if workers is not None else 0
        self.flight: Flight | None = workers.flight() if workers is not None and sendable(solve) else None
        self._ops: dict[OpId, Op] = {}
        """On their way."""

    def solve(self, layer: Layer) -> Iterator[Done]:
        """Take a layer on. While all workers are busy it waits: no more moments are held than workers have use for."""
        if self.flight is None:
            yield layer.op, solution(self.solver, layer)
            return
        self._ops[layer.op.id] = layer.op
        self.flight.submit(layer.op.id, solution, self.solver, layer)
        while len(self._ops) > self.width:
            yield self._next()

    def before(self, tensors: Iterable[TensorId]) -> Iterator[Done]:
        """What has to be done before the quantized network can compute these tensors."""
        if not self._ops:
            return
        needed = self._behind(tensors)
        while needed & self._ops.keys():
            yield self._next()

    def of_weight(self, weight: ParamId | None) -> Iterator[Done]:
        """What has to be done before it is known what becomes of a weight."""
        while any(op.weight == weight for op in self._ops.values()):
            yield self._next()

    def rest(self) -> Iterator[Done]:
        """All that is on its way."""
        while self._ops:
            yield self._next()

    def close(self) -> None:
        """Give up what hasn't begun."""
        if self.flight is not None:
            self.flight.__exit__(None, None, None)
        self._ops.clear()

    def _next(self) -> Done:
        assert self.flight is not None
        name, future = self.flight.next()
        return self._ops.pop(name), future.result()

    def _behind(self, tensors: Iterable[TensorId]) -> set[OpId]:
        """The ops that tensors are computed by."""
        found: set[OpId] = set()
        waiting = list(tensors)
        while waiting:
            op = self.graph.producer(waiting.pop())
            if op is not None and op.id not in found:
                found.add(op.id)
                waiting += op.data_inputs
        return found
