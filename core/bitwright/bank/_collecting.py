"""Filling a bank: one pass over the data serves every scheme, bit width, block size and target."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from bitwright.backend import Batch, Part, PartialExecution, Session, Tap
from bitwright.bank._bank import Bank
from bitwright.bank._record import INDEX, PRECISION, Number, StepEntry
from bitwright.bank._view import network_of
from bitwright.bank._writing import Writer
from bitwright.calibration import InParts, in_parts, sampled
from bitwright.calibration import collect as collect_statistics
from bitwright.data import DataLike, Dataset, samples_in
from bitwright.errors import InputError, TargetError
from bitwright.graph import (
    FLOAT_DTYPES,
    Graph,
    Op,
    OpKind,
    TensorId,
    groups_of,
    input_channels,
)
from bitwright.layerwise import blocks_within
from bitwright.placement import build_plan
from bitwright.plugins import registry
from bitwright.runs import versions
from bitwright.state import SimState, StateView
from bitwright.statistics import HistogramStatistic, LayerMoments, RangeStatistic, Request, Source
from bitwright.targets import target_names
from bitwright.technique import LayerwiseSettings, Step

GIB = 2**30


def collect(
    sim: StateView,
    data: DataLike,
    out: str | Path,
    *,
    layers: Sequence[str] = (),
    budget_gib: float | None = None,
    moments_gib: float = LayerwiseSettings().moments_gib,
    number: Number = "float64",
    every_tensor: bool = False,
    steps: Sequence[Step] = (),
) -> Bank:
    """Run the float network once over the data, and keep the statistics that solving takes.

    Held are, for every tensor that one of the registered targets or this simulation quantizes, a histogram and its
    range (by channel where a linear op reads it), and for every linear op the means and second moments of its input.
    Ops that read the same columns share them.

    Args:
        sim: the simulation, in the state that the bank will be valid for.
        data: as `QuantSim.open` takes them.
        out: the bank's folder; not there yet, or empty. It is whole or not there at all. The bank that would be
            written, there already from the same data in the same batches, is given back as it is.
        layers: names or glob patterns of the linear ops whose second moments are kept; none for all.
        budget_gib: size of all second moments on disk at most. The largest are left out first, and named in
            `Record.left_out`.
        moments_gib: memory of one layer's moments at most, as in `LayerwiseSettings`; a layer beyond it is kept in
            blocks of its input channels.
        number: type that second moments are kept in: "float64" as they are solved on; "float32" takes half the
            space, and of codes that lie between two numbers a few may fall to the other one.
        every_tensor: hold histograms of all tensors, for targets that aren't known yet.
        steps: what was applied to the model before, without data, for the record.

    Raises:
        InputError: the data are empty, don't fit, or hold NaN; a pattern matches no layer; the folder is there already.
    """
    state = sim.state
    dataset = state.open(data)
    if isinstance(dataset, Bank):
        raise InputError("a bank is collected from data, and this is a bank; banks are joined by `merge`")
    wanted, left_out = _chosen(state.graph, layers, number, budget_gib, moments_gib)
    tensors = _tensors(state, every_tensor=every_tensor)
    entries = tuple(StepEntry(technique=s.technique, settings=dict(s.settings)) for s in steps)
    if (there := _whole(Path(out), dataset, network_of(state), number, entries, wanted, left_out, tensors)) is not None:
        return there
    with Writer(Path(out), number) as writer:
        seen = Seen(dataset)
        shared: dict[object, list[Op]] = {}
        for op in wanted:
            shared.setdefault(_columns_key(op, state.graph), []).append(op)
        requests = [*_tensor_requests(state.graph, tensors), *_moment_requests(state.graph, shared, moments_gib)]
        found = collect_statistics(requests, _float_only(state), seen, progress=state.progress, divided=_divided(state))
        for tensor in tensors:
            histogram, extent = found[f"histogram/{tensor}"], found[f"range/{tensor}"]
            assert isinstance(histogram, HistogramStatistic)
            assert isinstance(extent, RangeStatistic)
            if histogram.seen and extent.seen:
                writer.add_tensor(tensor, histogram, extent.axis, extent.low, extent.high)
        places: dict[str, int] = {}
        for ops in shared.values():
            moments = found[f"moments/{ops[0].id}"]
            assert isinstance(moments, LayerMoments)
            if moments.count == 0:
                left_out.update({op.id: "no value of the data reached it" for op in ops})
            elif (place := writer.add_moments(moments)) is not None:
                places.update({op.id: place for op in ops})
            else:
                left_out.update({op.id: f"its moments overflow {number}" for op in ops})
        info = registry.backends().get(state.backend.name)
        writer.finish(
            network=network_of(state),
            steps=entries,
            samples=seen.count, data=[seen.fingerprint()],
            versions=versions(info.modules if info is not None else ()), layers=places, left_out=left_out,
        )  # fmt: skip
    return Bank.open(out)


def _whole(
    out: Path,
    data: Dataset,
    network: str,
    number: Number,
    steps: tuple[StepEntry, ...],
    wanted: Sequence[Op],
    left_out: Mapping[str, str],
    tensors: Iterable[TensorId],
) -> Bank | None:
    """What an earlier run of the same collection has finished, such as one that was killed in its last moment."""
    if not (out / INDEX).is_file():
        return None
    bank = Bank.open(out)
    record, ids = bank.record, {op.id for op in wanted}
    same = (record.network, record.number, record.steps) == (network, number, steps)
    held = record.layers.keys() <= ids and left_out.items() <= record.left_out.items()
    if not (same and held and record.tensors.keys() <= set(tensors)):
        return None
    seen = Seen(data)
    for _ in seen:
        pass
    if record.data != (seen.fingerprint(),):
        return None
    bank.verify()
    return bank


class Seen:
    """A dataset that counts and fingerprints what goes by in its first pass, so that no further one is needed."""

    def __init__(self, data: Dataset) -> None:
        self._data, self._digest, self._passed = data, hashlib.sha256(), False
        self.count = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            if not self._passed:
                self.count += samples_in(batch)
                for name, values in sorted(batch.items()):
                    self._digest.update(f"{name}{values.dtype}{values.shape}".encode())
                    self._digest.update(np.ascontiguousarray(values).data)
            yield batch
        self._passed = True

    @property
    def samples(self) -> int | None:
        """As many as the dataset itself tells."""
        return self._data.samples

    def fingerprint(self) -> str:
        """Of the batches that went by."""
        return self._digest.hexdigest()[:32]


def _float_only(state: SimState) -> Callable[[Source, Sequence[Tap]], Session]:
    return lambda source, taps: state.backend.session(state.native, taps)


def _divided(state: SimState) -> InParts | None:
    """The parts of the float network, where it is large."""

    def open_part(source: Source, part: Part, feeds: Sequence[TensorId] | None, taps: Sequence[Tap]) -> Session:
        if feeds is None:
            return state.backend.session(state.native, taps)
        assert isinstance(state.backend, PartialExecution)
        return state.backend.segment(state.native, feeds, taps)

    return in_parts(state.backend, state.graph, open_part)


# -- which tensors


def _tensors(state: SimState, *, every_tensor: bool) -> list[TensorId]:
    """Tensors whose values some target needs, in the order of the graph."""
    graph = state.graph
    produced = [*graph.inputs, *(t for op in graph.ops for t in op.outputs)]
    floats = [t for t in dict.fromkeys(produced) if t in graph.tensors and graph.tensors[t].dtype in FLOAT_DTYPES]
    if every_tensor:
        return floats
    plans = [state.plan]
    for name in target_names():
        with suppress(TargetError):  # one that contradicts itself on this graph, or is broken, quantizes nothing
            plans.append(build_plan(graph, name))
    needed = {t for plan in plans for site in plan.activations for t in plan.observed(site)}
    needed |= {op.data_inputs[0] for op in _linear(graph)}
    return [t for t in floats if t in needed]


def _tensor_requests(graph: Graph, tensors: Iterable[TensorId]) -> Iterator[Request]:
    for t in tensors:
        axis = _channels_of(graph, t)
        yield Request(
            f"histogram/{t}", (t,), sampled(lambda: HistogramStatistic(precision=PRECISION), graph.tensors[t])
        )
        yield Request(f"range/{t}", (t,), partial(RangeStatistic, axis))


def _channels_of(graph: Graph, tensor: TensorId) -> int | None:
    """The channel axis of a tensor whose channels techniques look at: one that linear ops read."""
    readers = [op for op in _linear(graph) if op.data_inputs[0] == tensor]
    if not readers:
        return None
    known = graph.tensors[tensor].channel_axis
    if known is not None:
        return known
    return -1 if readers[0].kind is OpKind.LINEAR else 1


# -- which layers


def _linear(graph: Graph) -> list[Op]:
    return [op for op in graph.linear_ops if op.weight is not None]


def features_of(op: Op, graph: Graph) -> int:
    """K of the op's columns."""
    shape = graph.params[op.weight or ""].shape
    return input_channels(op, shape) // groups_of(op) * int(np.prod(shape[2:], dtype=np.int64))


def _columns_key(op: Op, graph: Graph) -> tuple[object, ...]:
    """Equal for ops that read the same columns of the same tensor."""
    return op.data_inputs[0], op.kind, repr(op.attrs), features_of(op, graph)


def _chosen(
    graph: Graph, patterns: Sequence[str], number: Number, budget: float | None, memory: float
) -> tuple[list[Op], dict[str, str]]:
    """The linear ops whose moments are collected, and why the others are left out."""
    ops = _linear(graph)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(op.id, pattern) for op in ops):
            some = ", ".join(op.id for op in ops[:5]) or "none"
            raise InputError(f"{pattern!r} matches no linear layer of the model; its layers are called {some}, …")
    left: dict[str, str] = {}
    sizes: dict[object, int] = {}
    for op in ops:
        blocks, reason = blocks_of(op, graph, memory)
        if patterns and not any(fnmatch.fnmatchcase(op.id, p) for p in patterns):
            left[op.id] = "no pattern of --layers matches it"
        elif reason:
            left[op.id] = reason
        else:
            features = features_of(op, graph) // blocks
            each = {"float32": 4, "float64": 8}[number]
            sizes[_columns_key(op, graph)] = each * groups_of(op) * blocks * features * (features + 1) // 2
    if budget is not None:
        total = sum(sizes.values())
        for key in sorted(sizes, key=lambda k: sizes[k], reverse=True):
            if total <= budget * GIB:
                break
            total -= sizes[key]
            reason = f"its moments take {sizes.pop(key) / GIB:.3g} GiB, and the budget is {budget:.3g} GiB for all"
            left.update({op.id: reason for op in ops if op.id not in left and _columns_key(op, graph) == key})
    return [op for op in ops if op.id not in left], left


def blocks_of(op: Op, graph: Graph, memory: float) -> tuple[int, str]:
    """In how many blocks an op's moments take so many GiB; or 0, and why in none."""
    return blocks_within(memory, op, graph.params[op.weight or ""].shape, features_of(op, graph))


def _moment_requests(graph: Graph, shared: Mapping[object, Sequence[Op]], gib: float) -> Iterator[Request]:
    for op, *_ in shared.values():
        features, (blocks, _) = features_of(op, graph), blocks_of(op, graph, gib)
        axis = graph.tensors[op.data_inputs[0]].channel_axis
        make = partial(LayerMoments, op, features, axis, paired=False, blocks=blocks)
        memory = LayerMoments.bytes_for(op, features, paired=False, blocks=blocks)
        yield Request(f"moments/{op.id}", (op.data_inputs[0],), make, memory=memory)
