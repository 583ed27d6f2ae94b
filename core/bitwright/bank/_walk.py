"""The layer-by-layer service on a bank: each layer by its own moments, in the float network; nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bitwright.bank._bank import Bank
from bitwright.graph import Op
from bitwright.grids import EncodingTable
from bitwright.layerwise import Solving, dump, layer_of, left_at_nearest, load, name_left
from bitwright.progress import Store
from bitwright.state import SimState
from bitwright.statistics import LayerMoments
from bitwright.technique import LayerResult, LayerwiseSettings, Solve

GIB = 2**30


class BankWalk:
    """A `technique.LayerWalk` whose layers are independent: x̂ = x, whatever `quantized_inputs` and `residuals` say.

    Args:
        bank: whose moments are used.
        state: whose weights are solved.
        require: refuses a bank of another network.
        table: encodings in force.
        store: finished layers are kept here under "layer/<op id>".
        name: what warnings begin with.
    """

    def __init__(
        self, bank: Bank, state: SimState, require: Callable[[], None], table: EncodingTable, store: Store, name: str
    ) -> None:
        self._bank, self._state, self._require = bank, state, require
        self._table, self._store, self._name = table, store, name

    def __call__(
        self,
        ops: Sequence[str],
        solve: Solve,
        *,
        quantized_inputs: bool = True,
        quantized_activations: bool = True,
        products: bool = True,
        residuals: bool = False,
        moments_gib: float | None = None,
    ) -> Mapping[str, LayerResult]:
        """See `LayerWalk`.

        Raises:
            InputError: the bank is of another network.
        """
        self._require()
        budget = LayerwiseSettings().moments_gib if moments_gib is None else moments_gib
        state, bank = self._state, self._bank
        results: dict[str, LayerResult] = {}
        settled: dict[str, LayerResult] = {}
        wanted = set(ops)
        order = [op for op in state.graph.ops if op.id in wanted]
        solving = Solving(state.graph, state.workers, solve)

        def finish(op: Op, result: LayerResult, *, fresh: bool = True) -> None:
            if fresh:
                self._store.put(f"layer/{op.id}", dump(result))
            results[op.id] = settled[op.weight or ""] = result
            state.progress.advance(1, op.id)

        state.progress.start("Layers", len(order))
        try:
            for op in order:
                for done in solving.of_weight(op.weight):
                    finish(*done)
                shared = settled.get(op.weight or "")
                if (stored := load(self._store.get(f"layer/{op.id}"))) is not None:
                    finish(op, stored, fresh=False)
                elif shared is not None:
                    # A weight that several ops share was settled by the first of them.
                    finish(op, LayerResult(shared.weight, shared.encoding, None, {"shared": 1.0}, shared.left))
                elif left := self._missing(op.id, products, budget):
                    finish(op, left_at_nearest(state.params, op, self._table, left))
                else:
                    layer = layer_of(state.params, op, bank.layer(op, products=products), self._table)
                    for done in solving.solve(layer):
                        finish(*done)
            for done in solving.rest():
                finish(*done)
        finally:
            solving.close()
            state.progress.finish()
        results = {op.id: results[op.id] for op in order}
        name_left(self._name, results)
        return results

    def _missing(self, op: str, products: bool, budget: float) -> str:
        """Why a layer can't be solved; "" if it can."""
        record = self._bank.record
        if op not in record.layers:
            return f"the bank has no moments of it ({record.left_out.get(op, 'it was not collected')})"
        entry = record.moments[record.layers[op]]
        shape = self._state.graph.op(op)
        needed = LayerMoments.bytes_for(shape, entry.features, paired=False, products=products) / GIB
        if needed <= budget:
            return ""
        return (
            f"the moments of its {entry.features} input features take {needed:.3g} GiB, more than the {budget:.3g} GiB "
            "of moments_gib; raise it where memory allows"
        )
