"""A bank as one state of a simulation sees it: whether it is valid there, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bitwright.bank._bank import Bank
from bitwright.bank._walk import BankWalk
from bitwright.errors import InputError
from bitwright.graph import Graph, ParamRole, SetBias, SplitSharedParam
from bitwright.grids import EncodingTable
from bitwright.progress import Store
from bitwright.runs import fingerprint
from bitwright.state import Rounded, SimState
from bitwright.statistics import HistogramStatistic, LayerMoments, RangeStatistic, Request, Statistic
from bitwright.technique import Outcome


def network_of(state: SimState) -> str:
    """Fingerprint of the float network that a state has: its graph and its parameters."""
    return fingerprint.of_json([fingerprint.of_graph(state.graph), fingerprint.of_params(state.params)])


class BankView:
    """What a step may have of a bank.

    Attributes:
        used: whether it was asked for anything yet that refers to the network.
    """

    def __init__(self, bank: Bank, state: SimState) -> None:
        self.bank, self.state, self.used = bank, state, False

    def require(self) -> None:
        """Refuse a bank of another network.

        Raises:
            InputError: it is one; says by which techniques the network became another.
        """
        if not self.valid:
            path = str(self.bank.path)
            if changed := self.state.changed_by:
                steps = [name for name, _ in self.state.reports if name != "calibrate"]
                by_command = ""
                if set(changed) <= set(steps):  # not after a training, nor of a saved simulation
                    by_command = f"`bitwright collect --techniques {','.join(dict.fromkeys(steps))}`, or "
                way = (
                    f"{','.join(changed)} changed the network since: collect behind these steps ({by_command}"
                    "`bank.collect` of this simulation); only what rounds weights on this bank keeps it valid"
                )
            else:
                way = "it is of another model, other weights, or another framework; collect on this model"
            raise InputError(f"bank {path!r} was collected on another network than this: {way}")
        self.used = True

    @property
    def valid(self) -> bool:
        """Whether the state's float network, or the one that its weights were rounded from, is the bank's."""
        rounded = self.state.rounded
        if rounded is not None and rounded.native is self.state.native:
            return rounded.network == self.bank.record.network
        return network_of(self.state) == self.bank.record.network

    def statistics(self, requests: Sequence[Request], asks: str) -> dict[str, Statistic]:
        """Answers to requests, by key; optional ones are left out where there is none.

        Args:
            requests: whose statistics.
            asks: for whom, in messages.

        Raises:
            InputError: the bank is of another network, or has no answer to one that isn't optional.
        """
        if all(r.optional for r in requests) and not self.valid:
            return {}
        self.require()
        found: dict[str, Statistic] = {}
        for request in requests:
            answer = self._answer(request)
            if answer is None and request.instead is not None:
                answer = self._answer(replace(request, make=request.instead))
            if answer is not None:
                found[request.key] = answer
            elif not request.optional:
                raise InputError(self._lacking(request, asks))
        return found

    def walk(self, table: EncodingTable, store: Store, name: str) -> BankWalk:
        """The layer-by-layer service on its moments."""
        return BankWalk(self.bank, self.state, self.require, table, store, name)

    def noted(self, outcome: Outcome) -> Outcome:
        """An outcome whose report says that it rests on the bank, where it does."""
        if not self.used:
            return outcome
        thin = self.bank.record.thin
        some = "" if thin is None else f" with thin={thin}"
        told = (
            f"{outcome.report.summary}; on a bank of {self.bank.samples} samples{some}: inputs are the float network's"
        )
        return replace(outcome, report=replace(outcome.report, summary=told))

    def followed(self, now: SimState, outcome: Outcome) -> SimState:
        """The state after an outcome, for which the bank is still valid where it only rounds weights.

        Biases may change with them: they take back the shift of means that rounding brings. A technique that changes
        weights without putting them on a frozen grid changes what other layers see.
        """
        unchanged = now.native is self.state.native
        if unchanged or not (self.used and _only_rounds(outcome, self.state.graph)):
            return now
        return replace(now, rounded=Rounded(now.native, self.bank.record.network))

    def _answer(self, request: Request) -> Statistic | None:
        if len(request.tensors) != 1 or request.sources != ("float",):
            return None
        (tensor,) = request.tensors
        wanted = request.make()
        if isinstance(wanted, LayerMoments):
            held = wanted.op.id in self.bank.record.layers and not wanted.paired and not wanted.has_residual
            if not held or (wanted.has_products and self.bank.blocks(wanted.op) != wanted.blocks):
                return None
            return self.bank.layer(wanted.op, products=wanted.has_products)
        if (entry := self.bank.record.tensors.get(tensor)) is None:
            return None
        if isinstance(wanted, HistogramStatistic):
            same = (wanted.axis, wanted.step, wanted.layout) == (None, entry.step, entry.layout)
            return self.bank.histogram(tensor, wanted.precision, extremes=wanted.extremes) if same else None
        if isinstance(wanted, RangeStatistic):
            low, high = self.bank.ranges(tensor)
            if wanted.axis is None:
                low, high = np.asarray(low.min()), np.asarray(high.max())
            elif not self._same_axis(tensor, wanted.axis, entry.axis):
                return None
            wanted.restore({"low": low, "high": high})
            return wanted
        return None

    def _same_axis(self, tensor: str, asked: int, held: int | None) -> bool:
        if held is None or asked == held:
            return asked == held
        shape = self.state.graph.tensors[tensor].shape
        return shape is not None and asked % len(shape) == held % len(shape)

    def _lacking(self, request: Request, asks: str) -> str:
        where, (tensor, *_) = f"bank {str(self.bank.path)!r}", request.tensors
        if "simulated" in request.sources:
            return f"{asks} measures the quantized network, and {where} is of the float one: it needs data"
        kind = type(request.make()).__name__
        if tensor not in self.bank.record.tensors and kind in ("HistogramStatistic", "RangeStatistic"):
            return (
                f"{asks}: {where} knows nothing of tensor {tensor!r}; collect with this target "
                "(`bitwright collect --target`), or of every tensor (`--every-tensor`)"
            )
        return f"{asks} asks for a {kind} of {tensor!r}, which {where} doesn't have: it needs data"


def _only_rounds(outcome: Outcome, graph: Graph) -> bool:
    """Whether an outcome puts weights of linear ops on frozen grids, sets their biases, and changes nothing else."""
    linear = graph.linear_ops
    weights, biases = {op.weight for op in linear}, {op.params.get(ParamRole.BIAS) for op in linear}
    frozen = {site for site, encoding in outcome.encodings.items() if encoding.frozen}
    return all(isinstance(edit, SetBias | SplitSharedParam) for edit in outcome.edits) and all(
        id in biases or (id in weights and id in frozen) for id in outcome.params
    )
