"""Collecting from a network that is too large to be run as a whole: all data run through one part after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from bitwright.backend import Backend, Part, PartialExecution, Session, Tap, let_go, parts_of, reduced
from bitwright.calibration._collected import Collected, pack, taps_of, update_all
from bitwright.data import CACHE_BYTES, CutCache, Dataset
from bitwright.errors import InputError
from bitwright.files import Array
from bitwright.graph import Graph, TensorId
from bitwright.progress import Progress
from bitwright.statistics import Source, Statistic

OpenSession = Callable[[Source, Sequence[Tap]], Session]
OpenPart = Callable[[Source, Part, Sequence[TensorId] | None, Sequence[Tap]], Session]
"""Compiles a part of the float or the simulated network for taps and what it is fed (None: the network's inputs)."""
PART_BUDGET = 2**28
"""Bytes of the statistics that are collected together of one part, where no single one has more."""


@dataclass(frozen=True)
class InParts:
    """How a large network is run.

    Attributes:
        parts: of it, in their order.
        inputs: of the network.
        open: compiles a part, the first one too.
    """

    parts: Sequence[Part]
    inputs: Sequence[TensorId]
    open: OpenPart


def in_parts(backend: Backend[Any], graph: Graph, open: OpenPart) -> InParts | None:
    """How `collect` runs a network part by part; None where it is small, or its backend runs no parts."""
    parts = parts_of(graph) if isinstance(backend, PartialExecution) else []
    return InParts(parts, graph.inputs, open) if len(parts) > 1 else None


def stream_in_parts(
    collected: Sequence[Collected],
    divided: InParts,
    data: Dataset,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
    first: int,
    budget: int,
    finished: Callable[[str, Statistic], None],
) -> None:
    """Update statistics with all batches, each where the last of its tensors is computed; `first` numbers them.

    A part runs once more for each `budget` (or `PART_BUDGET`) of statistics, which `finished` takes when it has run.

    Raises:
        InputError: the data are empty, or a tensor holds NaN or infinity.
    """
    place = {t: i for i, part in enumerate(divided.parts) for t in part.computed}
    homes = [max(place.get(tap.tensor, 0) for _, tap in c.taps) for c in collected]
    with ExitStack() as caches:
        held: dict[Source, CutCache] = {}
        for index in range(max(homes, default=-1) + 1):
            here = [c for c, home in zip(collected, homes, strict=True) if home == index]
            later = [c for c, home in zip(collected, homes, strict=True) if home > index]
            kept = _kept(later, divided, place, index)
            fresh = {source: caches.enter_context(CutCache(CACHE_BYTES // len(kept))) for source in kept}
            for number, members in enumerate(pack(here, min(budget, PART_BUDGET)) or [[]]):
                keeps = (kept, fresh) if number == 0 else ({}, {})
                _run_part(divided, index, members, held, *keeps, data, pool, first)
                for c in members:
                    finished(c.request.key, c.handed_over())
                let_go()
            for cache in held.values():
                cache.close()
            held = fresh
            if progress is not None:
                progress.advance(1)


def _kept(
    later: Sequence[Collected], divided: InParts, place: dict[TensorId, int], index: int
) -> dict[Source, list[TensorId]]:
    """What is kept behind a part of each network, for the parts behind it and for statistics updated there."""
    found: dict[Source, list[TensorId]] = {}
    for source, taps in taps_of(later).items():
        early = (tap.tensor for tap in taps if place.get(tap.tensor, 0) <= index)
        found[source] = list(dict.fromkeys([*divided.parts[index + 1].crossing, *early]))
    return found


def _run_part(
    divided: InParts,
    index: int,
    here: Sequence[Collected],
    held: dict[Source, CutCache],
    kept: dict[Source, list[TensorId]],
    fresh: dict[Source, CutCache],
    data: Dataset,
    pool: ThreadPoolExecutor,
    first: int,
) -> None:
    part = divided.parts[index]
    wanted = taps_of(here)
    for source, tensors in kept.items():
        wanted.setdefault(source, {}).update((Tap(t), None) for t in tensors)
    sessions: dict[Source, Session] = {}
    for source, taps in wanted.items():
        computed = tuple(tap for tap in taps if tap.tensor in part.computed)
        # Sizes are often computed from the inputs, which therefore stay at hand.
        feeds = tuple(dict.fromkeys([*part.crossing, *divided.inputs])) if index else None
        if computed:
            sessions[source] = divided.open(source, part, feeds, computed)
    cached = {source: iter(cache) for source, cache in held.items()}
    batches = 0
    for batch in data:
        given = {source: dict(next(rows)) for source, rows in cached.items()}
        values: dict[Source, dict[Tap, Array]] = {}
        for source, taps in wanted.items():
            own = given.get(source, {})
            found = dict(sessions[source].run({**batch, **own})) if source in sessions else {}
            values[source] = {tap: found[tap] if tap in found else reduced(own[tap.tensor], tap) for tap in taps}
        for source, tensors in kept.items():
            fresh[source].append({t: values[source][Tap(t)] for t in tensors})
        update_all(pool, here, values, first + batches)
        values, given, found, own = {}, {}, {}, {}  # before the next batch runs
        batches += 1
    if batches == 0:
        raise InputError("the calibration data are empty: not one batch came; give at least one sample")
