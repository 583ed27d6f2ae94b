"""Collecting from a network that is too large to be run as a whole: all data run through one part after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from bitwright.backend import giving_back, let_go, settled
from bitwright.calibration._collected import Collected, pack
from bitwright.calibration._step import InParts, Places, Step
from bitwright.data import CACHE_BYTES, CutCache, Dataset, close_all
from bitwright.errors import InputError
from bitwright.progress import Progress
from bitwright.statistics import Source, Statistic

PART_BUDGET = 2**28
"""Bytes of the statistics that are collected together of one part, where no single one has more."""


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
    places = Places(collected, divided.parts)
    with giving_back(), ExitStack() as caches:
        let_go()  # what the opening of the network has left behind
        caches.enter_context(settled())
        held: dict[Source, CutCache] = {}
        for index in range(places.last + 1):
            kept = places.kept(index)
            fresh = {source: caches.enter_context(CutCache(CACHE_BYTES // len(kept))) for source in kept}
            for number, members in enumerate(pack(places.at(index), min(budget, PART_BUDGET)) or [[]]):
                step = Step(divided, divided.parts, index, members, kept if number == 0 else {})
                _run(step, held, fresh, data, pool, first)
                for c in members:
                    finished(c.request.key, c.handed_over())
                let_go()
            close_all(held.values())
            held = fresh
            if progress is not None:
                progress.advance(1)


def _run(
    step: Step,
    held: dict[Source, CutCache],
    fresh: dict[Source, CutCache],
    data: Dataset,
    pool: ThreadPoolExecutor,
    first: int,
) -> None:
    sessions = step.opened()
    cached = {source: iter(cache) for source, cache in held.items()}
    batches = 0
    for batch in data:
        given = {source: next(rows) for source, rows in cached.items()}
        rows = step.take(step.run(sessions, batch, given), pool, first + batches)
        for source, row in rows.items():
            fresh[source].append(row)
        del given, rows  # before the next batch runs
        batches += 1
    if batches == 0:
        raise InputError("the calibration data are empty: not one batch came; give at least one sample")
