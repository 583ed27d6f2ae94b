"""The layer-by-layer walk: each linear op sees the input that the already replaced layers before it produce.

The float and the quantized network advance together through the graph. Between two layers only the tensors
that cross a cut of the graph are kept (in memory up to a budget, else on disk), so that every op runs a bounded
number of times and memory doesn't grow with depth. The schedule of cuts depends on the graph alone: a resumed
run executes the same segments as the first, so that its numbers are bit-equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from bitwright.backend import LettingGo, ParamReader, PartialExecution, giving_back, let_go, parts_of, settled
from bitwright.graph import (
    Graph,
    Op,
    OpId,
    OpKind,
    ParamId,
    TensorId,
    groups_of,
    input_channels,
    output_channels,
)
from bitwright.grids import EncodingTable
from bitwright.layerwise._base import Finished, Walk
from bitwright.layerwise._cuts import Visit, schedule
from bitwright.layerwise._networks import Networks
from bitwright.layerwise._side_by_side import Solving
from bitwright.layerwise._solving import blocks_within, layer_of, left_at_nearest, name_blocks, name_left, name_scarce
from bitwright.progress import stage
from bitwright.statistics import LayerMoments
from bitwright.technique import LayerResult, LayerwiseSettings, Solve
from bitwright.workers import Workers


@dataclass
class LayerwiseWalk(Walk):
    """The real `LayerWalk` (see `technique`) over a backend, a model and calibration data.

    Attributes:
        moments_gib: largest moments of a layer, unless a call says otherwise.
        workers: where layers are solved; None solves them here.
    """

    unit = "layer"

    name: str = "layer by layer"
    moments_gib: float = LayerwiseSettings().moments_gib
    workers: Workers | None = None

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
        thin: int | None = None,
    ) -> Mapping[OpId, LayerResult]:
        """See `LayerWalk`."""
        results: dict[OpId, LayerResult] = {}
        finished = Finished(self)
        stored = finished.of(ops)
        visits = schedule(self.graph, ops, partial=isinstance(self.backend, PartialExecution))
        encodings = self.encodings
        if quantized_activations and quantized_inputs and len(stored) < len(ops):
            encodings = self.with_activations()
        with ExitStack() as opened:
            opened.enter_context(stage(self.progress, f"Layers ({self.name})", len(visits)))
            pair = Networks(
                self, encodings, [s.op for s in visits], quantized=quantized_inputs, activations=quantized_activations
            )
            opened.callback(pair.close)
            largest = self.moments_gib if moments_gib is None else moments_gib
            observing = _Observing(
                self.graph, encodings, largest, paired=quantized_inputs, products=products, residuals=residuals,
                most=None if column_blocks else 1, thin=thin,
            )  # fmt: skip
            last = max((i for i, s in enumerate(visits) if s.op.id not in stored), default=-1)
            # A weight that several ops share is settled by the first of them.
            replaced: dict[ParamId, LayerResult] = {}
            solving = Solving(self.graph, self.workers, solve)
            opened.callback(solving.close)
            params = ParamReader(self.backend, self.model, self.graph)
            large = len(parts_of(self.graph)) > 1
            tidy = let_go if large else LettingGo()

            def finish(op: Op, result: LayerResult, *, fresh: bool = True) -> None:
                if fresh:
                    result = finished.keep(op.id, result)
                results[op.id] = result
                replaced[op.weight or ""] = result
                pair.replace(op, result)
                self.progress.advance(1, op.id)

            if large:
                opened.enter_context(giving_back())
                let_go()  # what was opened before has left behind
                opened.enter_context(settled())
            for index, visit in enumerate(visits):
                op, result = visit.op, stored.get(visit.op.id)
                for done in solving.of_weight(op.weight):
                    finish(*done)
                shared = replaced.get(op.weight or "")
                seen, observed = _Observed(), None  # the last layer's moments go before this one's are made
                if result is None and shared is None:
                    seen = observing.of(visit)
                observed = seen.moments if seen.fresh else None
                # Behind the last unfinished layer nothing has to run any more.
                if index <= last and (observed is not None or visit.moves):
                    if quantized_inputs:
                        # What is being solved before them goes into the quantized network first.
                        wanted = visit.cut if visit.moves else filter(None, (op.data_inputs[0], seen.addend))
                        for done in solving.before(wanted):
                            finish(*done)
                    pair.run(visit, observed, seen.addend)
                    if observed is not None:
                        observed.settle()
                    tidy()  # before the layer is solved, which takes memory itself
                if result is not None:
                    finish(op, result, fresh=False)
                elif shared is not None:
                    finish(op, replace(shared, bias=None, figures={"shared": 1.0}))
                elif seen.moments is None:
                    finish(op, left_at_nearest(params, op, encodings, seen.left))
                else:
                    for done in solving.solve(layer_of(params, op, seen.moments, encodings)):
                        finish(*done)
            for done in solving.rest():
                finish(*done)
        results = {visit.op.id: results[visit.op.id] for visit in visits}
        name_left(self.name, results)
        name_blocks(self.name, results)
        few = {op: result.figures.get("columns_per_feature") for op, result in results.items()}
        name_scarce(self.name, {op: columns for op, columns in few.items() if columns is not None})
        return results


@dataclass(frozen=True)
class _Observed:
    """What is known of a layer's input.

    Attributes:
        moments: of it; None if it isn't observed.
        addend: the tensor that is added to the layer's output, where that counts too.
        fresh: the batches have yet to be run through the moments.
        left: why the layer isn't to be solved.
    """

    moments: LayerMoments | None = None
    addend: TensorId | None = None
    fresh: bool = False
    left: str = ""


class _Observing:
    """Says what is observed of each layer that is to be solved.

    Args:
        graph: of the walk.
        encodings: in force.
        budget: largest moments of a layer, in GiB.
        paired: the quantized network's inputs are observed beside the float one's.
        products, residuals: see `LayerWalk`.
        most: blocks of columns that moments may be cut into.
        thin: see `LayerMoments`.
    """

    def __init__(
        self,
        graph: Graph,
        encodings: EncodingTable,
        budget: float,
        *,
        paired: bool,
        products: bool,
        residuals: bool,
        most: int | None,
        thin: int | None,
    ) -> None:
        self._graph, self._encodings, self._budget = graph, encodings, budget
        self._paired, self._products, self._residuals, self._most = paired, products, residuals, most
        self._thin = thin
        self._known: tuple[object, LayerMoments] | None = None

    def of(self, visit: Visit) -> _Observed:
        """Empty moments for a layer's input, those of the layer before where it reads the same, or why there are none.

        What several layers read (queries, keys and values) is observed once: nothing that is replaced between them lies
        before it.
        """
        op, weight = visit.op, visit.op.weight or ""
        shape, features = self._graph.params[weight].shape, self._features(op)
        blocks, left = blocks_within(
            self._budget, op, shape, features, self._encodings.get(weight), paired=self._paired,
            products=self._products, most=self._most,
        )  # fmt: skip
        if not blocks:
            return _Observed(left=left)
        addend = None
        if self._residuals and self._products and self._paired and blocks == 1:
            addend = self._addend(visit)
        same = (op.data_inputs[0], op.kind, op.attrs, features, blocks)
        if addend is None and self._known is not None and self._known[0] == same:
            return _Observed(self._known[1])
        self._known = None
        moments = LayerMoments(
            op, features, self._graph.tensors[op.data_inputs[0]].channel_axis, paired=self._paired,
            products=self._products, residual_outputs=output_channels(op, shape) if addend is not None else 0,
            blocks=blocks, thin=self._thin,
        )  # fmt: skip
        if addend is None:
            self._known = same, moments
        return _Observed(moments, addend, fresh=True)

    def _addend(self, visit: Visit) -> TensorId | None:
        """The tensor that is added to the layer's output and known before it; None if there is no such sum."""
        op, graph = visit.op, self._graph
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
        shape = self._graph.params[op.weight or ""].shape
        kernel = int(np.prod(shape[2:], dtype=np.int64)) if len(shape) > 2 else 1
        return input_channels(op, shape) // groups_of(op) * kernel
