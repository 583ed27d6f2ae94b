"""One streaming pass over the data serves every statistic that a step asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from bitwright.backend import Batch
from bitwright.calibration._collected import Collected, pack, run, taps_of, update_all
from bitwright.calibration._part_by_part import stream_in_parts
from bitwright.calibration._products import side_by_side
from bitwright.calibration._stage_by_stage import stream_in_stages
from bitwright.calibration._stages import stages_of
from bitwright.calibration._step import InParts, OpenSession
from bitwright.data import Dataset, samples_in
from bitwright.errors import InputError
from bitwright.progress import Once, Progress
from bitwright.statistics import Request, Statistic

BUDGET = 2 * 2**30
"""Default memory of the statistics that are collected together, in bytes."""


def collect(
    requests: Sequence[Request],
    open_session: OpenSession,
    data: Dataset,
    *,
    budget_bytes: int = BUDGET,
    progress: Progress | None = None,
    divided: InParts | None = None,
    first_batch: int = 0,
    picking: bool = False,
    finished: Callable[[str, Statistic], None] | None = None,
) -> dict[str, Statistic]:
    """Run the networks over the data and return the finished statistics by key.

    Requests share their tensors: each is taken from the network once a batch, already reduced where a statistic
    allows it. Statistics are updated side by side on threads, each by its batches in order, so that results don't
    depend on timing. Requests whose memory exceeds the budget together are collected in several passes; one that
    exceeds it alone has a pass of its own.

    What the C library keeps of freed values serves the next pass; a caller that runs none gives it back
    (`bitwright.backend.trim`).

    Args:
        requests: what to collect; keys are unique.
        open_session: compiles the float or the simulated network for a set of taps.
        data: the calibration data.
        budget_bytes: memory of the statistics of one pass; of a part of a large network never more than `PART_BUDGET`.
        progress: where progress is shown, in samples.
        divided: how parts of the network are run. Of a large one, all data run through one part before the next is
            compiled, and what crosses between them is kept, in memory or on disk. Of another, whose taps of a batch
            take much memory together, each batch runs in stages (`stages_of`). None runs it as a whole.
        first_batch: what messages number batches from.
        picking: sessions that `open_session` opens are `PickingSession`s: moments that count some positions are given
            these alone. Not for networks in parts.
        finished: takes each statistic with its key as soon as it has seen all: behind its part, where the network is
            run in parts. None is held then, and none returned.

    Raises:
        InputError: the data are empty; a tensor holds NaN or infinity (named, with the batch); a key is used twice.
    """
    keys = [r.key for r in requests]
    if twice := {k for k in keys if keys.count(k) > 1}:
        raise InputError(f"two statistics are requested under the key {min(twice)!r}")
    found: dict[str, Statistic] = {}
    take = found.__setitem__ if finished is None else finished
    collected = [Collected(r, picking=picking and divided is None) for r in requests]
    large = divided is not None and len(divided.parts) > 1
    passes = [collected] if large and collected else pack(collected, budget_bytes)
    products = sum(c.multiplies for c in collected)
    if divided is not None and large:  # those of a part come at a time
        products //= len(divided.parts)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool, side_by_side(products):
        for number, members in enumerate(passes):
            note = f" ({number + 1} of {len(passes)})" if len(passes) > 1 else ""
            if progress is not None:
                steps = len(divided.parts) if divided is not None and large else data.samples
                progress.start(f"Collecting statistics{note}", steps)
            try:
                if divided is not None and large:
                    stream_in_parts(members, divided, data, pool, progress, first_batch, budget_bytes, take)
                else:
                    _pass(members, open_session, divided, data, pool, Once(progress), first_batch, take)
            finally:
                if progress is not None:
                    progress.finish()
    return {key: found[key] for key in keys if key in found}


def _pass(
    members: Sequence[Collected],
    open_session: OpenSession,
    divided: InParts | None,
    data: Dataset,
    pool: ThreadPoolExecutor,
    progress: Once,
    first: int,
    take: Callable[[str, Statistic], None],
) -> None:
    """One pass over the data, each batch through the whole network or in stages.

    Raises:
        InputError: the data are empty, or a tensor holds NaN or infinity.
    """
    size, batches = _size_of_first(iter(data))
    if divided is not None:
        stages = stages_of(divided.graph, taps_of(members), size)
        if len(stages) > 1:
            members, batches = stream_in_stages(
                members, divided, stages, batches, data.__iter__, pool, progress, first, take
            )
    if members:
        _stream(members, open_session, batches, pool, progress, first)
    for c in members:
        take(c.request.key, c.handed_over())


def _size_of_first(batches: Iterator[Batch]) -> tuple[int, Iterator[Batch]]:
    """Samples of the first batch, and all batches; none is held here once it has been taken.

    Raises:
        InputError: there is none.
    """
    held = [batch for batch in (next(batches, None),) if batch is not None]
    if not held:
        raise InputError("the calibration data are empty: not one batch came; give at least one sample")

    def all_of_them() -> Iterator[Batch]:
        yield held.pop()
        yield from batches

    return samples_in(held[0]), all_of_them()


def _stream(
    collected: Sequence[Collected],
    open_session: OpenSession,
    batches: Iterable[Batch],
    pool: ThreadPoolExecutor,
    progress: Once,
    first: int,
) -> None:
    sessions = {source: open_session(source, tuple(taps)) for source, taps in taps_of(collected).items()}
    progress.anew()  # stages that can't be run may have come some way
    for number, batch in enumerate(batches, first):
        values = {source: run(session, batch, collected) for source, session in sessions.items()}
        update_all(pool, collected, values, number)
        del values  # before the next batch runs: of a deep network they are most of what a pass takes
        progress.advance(samples_in(batch))
