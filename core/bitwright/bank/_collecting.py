"""Filling a bank: one pass over the data serves every scheme, bit width, block size and target."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from bitwright.backend import Batch, Picking
from bitwright.bank._bank import Bank
from bitwright.bank._record import INDEX, Number, StepEntry
from bitwright.bank._requests import (
    all_requests,
    blocks_of,
    columns_key,
    divided,
    features_of,
    float_only,
    linear_ops,
)
from bitwright.bank._shares import SHARE, Wanted, in_shares
from bitwright.bank._view import network_of
from bitwright.bank._writing import Writer
from bitwright.calibration import collect as collect_statistics
from bitwright.data import DataLike, Dataset, samples_in
from bitwright.errors import InputError, TargetError
from bitwright.files import sweep_beside, sweep_scratch
from bitwright.graph import (
    FLOAT_DTYPES,
    Graph,
    Op,
    TensorId,
    groups_of,
)
from bitwright.layerwise import name_scarce
from bitwright.placement import build_plan
from bitwright.plugins import registry
from bitwright.runs import versions
from bitwright.state import SimState, StateView
from bitwright.statistics import HistogramStatistic, LayerMoments, RangeStatistic, Statistic
from bitwright.targets import load_target, target_names
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
    number: Number = "float32",
    every_tensor: bool = False,
    steps: Sequence[Step] = (),
    share: int | None = None,
    thin: int | None = None,
) -> Bank:
    """Run the float network once over the data, and keep the statistics that solving takes.

    Held are, for every tensor that this simulation or one of the registered targets quantizes (but those that keep out
    of banks, `targets.Extension.in_banks`), a histogram and its range (by channel where a linear op reads it), and for
    every linear op the means and second moments of its input. Ops that read the same columns share them.

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
        number: type that second moments are kept in. Techniques take them as "float32" has them in any case; "float64"
            takes twice the space, and adds up without loss where many banks are merged.
        every_tensor: hold histograms of all tensors, for targets that aren't known yet.
        steps: what was applied to the model before, without data, for the record.
        share: batches that are collected together; shares are added in the order of the data, here or as the
            simulation's workers bring them (`attach`): the bank is the same to the bit. None for all of them together,
            or with workers 8.
        thin: of each sample, moments count one position for every so many features of a layer, 4 at least, as
            `LayerwiseSettings.thin` does on data; None for all positions. Layers that come to fewer than 4 columns a
            feature are named in a warning.

    Raises:
        InputError: the data are empty, don't fit, or hold NaN; `thin` is less than 1; a pattern matches no layer; the
            folder is there already.
    """
    state = sim.state
    dataset = state.open(data)
    if isinstance(dataset, Bank):
        raise InputError("a bank is collected from data, and this is a bank; banks are joined by `merge`")
    if thin is not None and thin < 1:
        raise InputError(f"thin={thin}: moments count one position for every 1, 2, … features of a layer")
    wanted, left_out = _chosen(state.graph, layers, number, budget_gib, moments_gib)
    tensors = _tensors(state, every_tensor=every_tensor)
    entries = tuple(StepEntry(technique=s.technique, settings=dict(s.settings)) for s in steps)
    sweep_beside(Path(out))
    sweep_scratch()
    network, kind = network_of(state), (number, thin)
    if (there := _whole(Path(out), dataset, network, kind, entries, wanted, left_out, tensors)) is not None:
        return there
    scarce: dict[str, float] = {}
    with Writer(Path(out), number, thin) as writer:
        seen = Seen(dataset)
        shared: dict[object, list[Op]] = {}
        for op in wanted:
            shared.setdefault(columns_key(op, state.graph), []).append(op)
        requests = all_requests(state.graph, tensors, shared, moments_gib, thin)
        size = SHARE if share is None and state.workers is not None else share
        pending: dict[str, Statistic] = {}
        places: dict[str, int] = {}
        readers = {f"moments/{ops[0].id}": ops for ops in shared.values()}

        def finished(key: str, statistic: Statistic) -> None:
            """Take it at once: the moments of all layers together may be many times the model."""
            if not isinstance(statistic, LayerMoments):
                tensor = key.partition("/")[2]
                if (other := pending.pop(tensor, None)) is None:
                    pending[tensor] = statistic
                    return
                histogram, extent = sorted((other, statistic), key=lambda s: isinstance(s, RangeStatistic))
                assert isinstance(histogram, HistogramStatistic)
                assert isinstance(extent, RangeStatistic)
                if histogram.seen and extent.seen:
                    writer.add_tensor(tensor, histogram, extent.axis, extent.low, extent.high)
            elif statistic.count == 0:
                left_out.update({op.id: "no value of the data reached it" for op in readers[key]})
            elif (place := writer.add_moments(statistic)) is not None:
                places.update({op.id: place for op in readers[key]})
                if statistic.scarce:
                    scarce.update({op.id: statistic.per_feature for op in readers[key]})
            else:
                left_out.update({op.id: f"its moments overflow {number}" for op in readers[key]})

        if size is None:
            opened, whole = float_only(state.backend, state.native), divided(state.backend, state.native, state.graph)
            collect_statistics(
                requests, opened, seen, progress=state.progress, divided=whole,
                picking=isinstance(state.backend, Picking), finished=finished,
            )  # fmt: skip
        else:
            asked = Wanted(tuple(tensors), tuple(ops[0].id for ops in shared.values()), moments_gib, thin)
            for key, statistic in in_shares(state, requests, seen, size, asked, writer.folder).items():
                finished(key, statistic)
        info = registry.backends().get(state.backend.name)
        writer.finish(
            network=network,
            steps=entries,
            samples=seen.count, data=[seen.fingerprint()],
            versions=versions(info.modules if info is not None else ()), left_out=left_out,
            layers={op.id: places[op.id] for op in wanted if op.id in places},
        )  # fmt: skip
    name_scarce("collect", scarce)
    return Bank.open(out)


def _whole(
    out: Path,
    data: Dataset,
    network: str,
    kind: tuple[Number, int | None],
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
    same = (record.network, (record.number, record.thin), record.steps) == (network, kind, steps)
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


# -- which tensors


def _tensors(state: SimState, *, every_tensor: bool) -> list[TensorId]:
    """Tensors whose values this simulation or a target needs, in the order of the graph."""
    graph = state.graph
    produced = [*graph.inputs, *(t for op in graph.ops for t in op.outputs)]
    floats = [t for t in dict.fromkeys(produced) if t in graph.tensors and graph.tensors[t].dtype in FLOAT_DTYPES]
    if every_tensor:
        return floats
    plans = [state.plan]
    for name in target_names():
        with suppress(TargetError):  # one that contradicts itself on this graph, or is broken, quantizes nothing
            if (target := load_target(name)).config.bitwright.in_banks:
                plans.append(build_plan(graph, target))
    needed = {t for plan in plans for site in plan.activations for t in plan.observed(site)}
    needed |= {op.data_inputs[0] for op in linear_ops(graph)}
    return [t for t in floats if t in needed]


# -- which layers


def _chosen(
    graph: Graph, patterns: Sequence[str], number: Number, budget: float | None, memory: float
) -> tuple[list[Op], dict[str, str]]:
    """The linear ops whose moments are collected, and why the others are left out."""
    ops = linear_ops(graph)
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
            sizes[columns_key(op, graph)] = each * groups_of(op) * blocks * features * (features + 1) // 2
    if budget is not None:
        total = sum(sizes.values())
        for key in sorted(sizes, key=lambda k: sizes[k], reverse=True):
            if total <= budget * GIB:
                break
            total -= sizes[key]
            reason = f"its moments take {sizes.pop(key) / GIB:.3g} GiB, and the budget is {budget:.3g} GiB for all"
            left.update({op.id: reason for op in ops if op.id not in left and columns_key(op, graph) == key})
    return [op for op in ops if op.id not in left], left
