"""Collecting in shares: some batches at a time, here or on workers, added in the order of the data."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Picking, trim
from bitwright.bank._requests import Opener, all_requests, divided, float_only
from bitwright.calibration import InParts, collect
from bitwright.data import Dataset, samples_in
from bitwright.errors import BitwrightError, InputError
from bitwright.files import cannot_write
from bitwright.graph import Op, OpId, TensorId
from bitwright.plugins import registry
from bitwright.state import SimState
from bitwright.statistics import LayerMoments, Request, Statistic

SHARE = 8
"""Batches of a share where there are workers, and nothing else is said."""
States = Mapping[str, Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Wanted:
    """What is collected, in words that travel: tensors, ops for their columns, the memory of one op's moments, and what
    they count."""

    tensors: tuple[TensorId, ...]
    ops: tuple[OpId, ...]
    moments_gib: float
    thin: int | None = None


@dataclass(frozen=True)
class _Share:
    """A dataset of some batches.

    Attributes:
        batches: them.
        first: number of the first one among all.
        before: samples in those before it.
    """

    batches: tuple[Batch, ...]
    first: int
    before: int

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    @property
    def samples(self) -> int:
        return sum(samples_in(batch) for batch in self.batches)

    def fingerprint(self) -> str:
        raise NotImplementedError("a share is known by the data that it is of")


def in_shares(
    state: SimState, requests: Sequence[Request], data: Dataset, size: int, wanted: Wanted, folder: Path
) -> dict[str, Statistic]:
    """As `calibration.collect`, `size` batches at a time; sums depend on that and not on who computes them.

    Args:
        state: whose float network is run, by its workers if it has any that can open it.
        requests: what is collected here.
        data: in batches.
        size: batches of a share.
        wanted: the same as `requests`.
        folder: where the network lies meanwhile, for the workers to open.

    Raises:
        InputError: the data are empty, or don't fit.
        WorkerError: a share's worker died again and again.
    """
    total = {request.key: request.make() for request in requests}
    state.progress.start("Collecting statistics", data.samples)
    shares = 0
    try:
        for samples, found in _collected(state, requests, data, size, wanted, folder):
            for key, statistic in total.items():
                statistic.merge(found[key])
            shares += 1
            state.progress.advance(samples)
    finally:
        state.progress.finish()
    if not shares:
        raise InputError("the calibration data are empty: not one batch came; give at least one sample")
    trim()
    return total


def _collected(
    state: SimState, requests: Sequence[Request], data: Dataset, size: int, wanted: Wanted, folder: Path
) -> Iterator[tuple[int, Mapping[str, Statistic]]]:
    """(samples, statistics) of the shares, in order."""
    opened, whole = float_only(state.backend, state.native), divided(state.backend, state.native, state.graph)
    if state.workers is None or (file := _laid_out(state, folder)) is None:
        for share in _shares(data, size):
            yield (
                share.samples,
                collect(
                    _of_share(share, requests),
                    opened,
                    share,
                    divided=whole,
                    first_batch=share.first,
                    picking=isinstance(state.backend, Picking),
                ),
            )
        return
    try:
        ready: dict[int, States] = {}
        sizes: list[int] = []
        sent = taken = 0
        with state.workers.flight() as flight:
            shares = _shares(data, size)
            while True:
                # No more batches are held than workers have use for.
                for share in islice(shares, max(0, state.workers.width + 1 - len(flight))):
                    flight.submit(str(sent), share_of, state.backend.name, str(file), wanted, share)
                    sizes.append(share.samples)
                    sent += 1
                if taken == sent:
                    break
                while taken not in ready:
                    name, future = flight.next()
                    ready[int(name)] = future.result()
                yield sizes[taken], _restored(requests, ready.pop(taken))
                taken += 1
    finally:
        shutil.rmtree(file.parent, ignore_errors=True)
    if file.parent.exists():
        raise cannot_write(file.parent, OSError(f"{file.parent} can't be removed"))


def _shares(data: Dataset, size: int) -> Iterator[_Share]:
    batches, first, before = iter(data), 0, 0
    while some := tuple(islice(batches, size)):
        share = _Share(some, first, before)
        yield share
        first += len(some)
        before += share.samples


def _of_share(share: _Share, requests: Sequence[Request]) -> list[Request]:
    """Requests whose moments know which samples of the data theirs are."""
    return [replace(r, make=partial(_begun, r.make, share.before)) for r in requests]


def _begun(make: Callable[[], Statistic], sample: int) -> Statistic:
    statistic = make()
    if isinstance(statistic, LayerMoments):
        statistic.begin_at(sample)
    return statistic


def _laid_out(state: SimState, folder: Path) -> Path | None:
    """Put the float network where workers find it, under a path that never was before: they know what they have
    opened by it. None if it can't be saved."""
    try:
        place = Path(tempfile.mkdtemp(prefix="network-", dir=folder))
    except OSError:
        return None
    try:
        return state.backend.save(state.native, place / f"model{registry.backends()[state.backend.name].suffix}")
    except (OSError, BitwrightError):
        shutil.rmtree(place, ignore_errors=True)
        return None


def _restored(requests: Sequence[Request], states: States) -> dict[str, Statistic]:
    found = {}
    for request in requests:
        found[request.key] = request.make()
        found[request.key].restore(states[request.key])
    return found


def share_of(backend: str, network: str, wanted: Wanted, share: _Share) -> States:
    """A share's statistics: what is sent to workers."""
    with _ONE_AT_A_TIME:
        opened, whole, requests = _open(backend, network, wanted)
        found = collect(
            _of_share(share, requests), opened, share, divided=whole, first_batch=share.first,
            picking=isinstance(registry.backend(backend), Picking),
        )  # fmt: skip
    return {key: {name: np.asarray(v) for name, v in s.state().items()} for key, s in found.items()}


_ONE_AT_A_TIME = Lock()
"""The network is opened once a process, and its threads collect one after another."""


@lru_cache(maxsize=1)
def _open(backend: str, network: str, wanted: Wanted) -> tuple[Opener, InParts | None, list[Request]]:
    adapter = registry.backend(backend)
    model = adapter.load(Path(network))
    graph = adapter.graph(model)
    shared: dict[object, list[Op]] = {op: [graph.op(op)] for op in wanted.ops}
    return (
        float_only(adapter, model),
        divided(adapter, model, graph),
        all_requests(graph, wanted.tensors, shared, wanted.moments_gib, wanted.thin),
    )
