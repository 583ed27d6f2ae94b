"""The layer-by-layer service on a bank: each layer by its own moments, in the float network; nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from bitwright.bank._bank import Bank
from bitwright.errors import InputError
from bitwright.graph import Op
from bitwright.grids import EncodingTable
from bitwright.layerwise import Solving, blocks_within, dump, layer_of, left_at_nearest, load, name_blocks, name_left
from bitwright.progress import Store, stage
from bitwright.state import SimState
from bitwright.technique import LayerResult, LayerwiseSettings, Solve


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
        column_blocks: bool = False,
        thin: int | None = None,
    ) -> Mapping[str, LayerResult]:
        """See `LayerWalk`.

        Raises:
            InputError: the bank is of another network, or its moments count other positions than are asked for.
        """
        self._require()
        if thin is not None and thin != self._bank.record.thin:
            held = self._bank.record.thin
            has = "count every position" if held is None else f"were collected with thin={held}"
            raise InputError(
                f"{self._name}: thin={thin}, but the moments of bank {str(self._bank.path)!r} {has}; leave thin out, "
                f"or collect another bank (`bitwright collect --thin {thin}`)"
            )
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

        with stage(state.progress, f"Layers ({self._name})", len(order)), closing(solving):
            for op in order:
                for done in solving.of_weight(op.weight):
                    finish(*done)
                shared = settled.get(op.weight or "")
                if (stored := load(self._store.get(f"layer/{op.id}"))) is not None:
                    finish(op, stored, fresh=False)
                    continue
                if shared is not None:
                    # A weight that several ops share was settled by the first of them.
                    finish(op, LayerResult(shared.weight, shared.encoding, None, {"shared": 1.0}, shared.left))
                    continue
                blocks, left = self._blocks(op, products, budget, column_blocks)
                if left:
                    finish(op, left_at_nearest(state.params, op, self._table, left))
                else:
                    moments = bank.layer(op, products=products, blocks=blocks)
                    layer = layer_of(state.params, op, moments, self._table)
                    for done in solving.solve(layer):
                        finish(*done)
            for done in solving.rest():
                finish(*done)
        results = {op.id: results[op.id] for op in order}
        name_left(self._name, results)
        name_blocks(self._name, results)
        return results

    def _blocks(self, op: Op, products: bool, budget: float, allowed: bool) -> tuple[int, str]:
        """In how many blocks a layer is solved; or 0, and why it can't be."""
        record = self._bank.record
        if op.id not in record.layers:
            return 0, f"the bank has no moments of it ({record.left_out.get(op.id, 'it was not collected')})"
        entry = record.moments[record.layers[op.id]]
        kept = entry.blocks if products else 1
        if kept > 1 and not allowed:
            return 0, f"the bank has its moments in {kept} blocks, which this technique doesn't take"
        shape = self._state.graph.params[op.weight or ""].shape
        return blocks_within(
            budget, op, shape, entry.features * entry.blocks, self._table.get(op.weight or ""), products=products,
            most=None if allowed else 1, multiple_of=kept,
        )  # fmt: skip
