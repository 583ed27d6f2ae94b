"""Collecting from a network whose taps of one batch take much memory: each batch runs through one stage after another,
and what a stage hands out is let go before the next one runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from bitwright.backend import Batch, LettingGo, Part, Session
from bitwright.calibration._collected import Collected
from bitwright.calibration._stages import crossing_bytes
from bitwright.calibration._step import InParts, Places, Step
from bitwright.data import samples_in
from bitwright.errors import BitwrightError
from bitwright.progress import Once
from bitwright.statistics import Source, Statistic

HELD_BYTES = 2**24
"""Bytes of all data, with what crosses between two stages, that are held in memory to run stages one by one."""


def stream_in_stages(
    collected: Sequence[Collected],
    divided: InParts,
    stages: Sequence[Part],
    batches: Iterator[Batch],
    again: Callable[[], Iterator[Batch]],
    pool: ThreadPoolExecutor,
    progress: Once,
    first: int,
    finished: Callable[[str, Statistic], None],
) -> tuple[list[Collected], Iterator[Batch]]:
    """Update statistics with all batches, each where the last of its tensors is computed.

    Few data all run through one stage before the next is compiled; its session and statistics go with it. Of more
    data, batch after batch runs through all stages, whose sessions stay.

    Args:
        collected: the statistics.
        divided: the network.
        stages: of it, in their order.
        batches: of all data, at least one.
        again: begins anew with all data.
        pool: where statistics are updated.
        progress: where progress is shown, in samples.
        first: what messages number batches from.
        finished: takes each statistic with its key as soon as it has seen all.

    Returns:
        What can't be collected so, since a stage by itself isn't compiled or doesn't run, and all data for it: none,
        as a rule. Where the whole network doesn't run either, it is for that to say so.

    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    head, more = _few(batches, crossing_bytes(divided.graph, stages))
    places = Places(collected, stages)
    steps = [Step(divided, stages, i, places.at(i), places.kept(i)) for i in range(places.last + 1)]
    if more is None:
        left = _stage_by_stage(steps, head, pool, progress, first, finished)
        return left, iter(head)
    try:
        opened = [step.opened() for step in steps]
    except BitwrightError:
        return list(collected), chain(head, more)
    if not _batch_by_batch(steps, opened, _let_go(head, more), pool, progress, first):
        return _anew(collected), again()
    for c in collected:
        finished(c.request.key, c.handed_over())
    return [], iter(())


def _stage_by_stage(
    steps: Sequence[Step],
    batches: Sequence[Batch],
    pool: ThreadPoolExecutor,
    progress: Once,
    first: int,
    finished: Callable[[str, Statistic], None],
) -> list[Collected]:
    """All batches through one stage after another; what is left where one of them can't be run."""
    held: list[Mapping[Source, Batch]] = [{} for _ in batches]
    tidy = LettingGo()
    for index, step in enumerate(steps):
        left = [c for later in steps[index:] for c in later.here]
        try:
            sessions = step.opened()
        except BitwrightError:
            return left
        for number, batch in enumerate(batches):
            try:
                values = step.run(sessions, batch, held[number])
            except BitwrightError:
                return _anew(left)
            held[number] = step.take(values, pool, first + number)
            del values  # before the next batch runs
            if step is steps[-1]:
                progress.advance(samples_in(batch))
        del sessions
        for c in step.here:
            finished(c.request.key, c.handed_over())
        tidy()
    return []


def _batch_by_batch(
    steps: Sequence[Step],
    opened: Sequence[Mapping[Source, Session]],
    batches: Iterable[Batch],
    pool: ThreadPoolExecutor,
    progress: Once,
    first: int,
) -> bool:
    """Each batch through all stages; whether they could all be run."""
    for number, batch in enumerate(batches):
        held: Mapping[Source, Batch] = {}
        for step, sessions in zip(steps, opened, strict=True):
            try:
                values = step.run(sessions, batch, held)
            except BitwrightError:
                return False
            held = step.take(values, pool, first + number)
            del values
        progress.advance(samples_in(batch))
    return True


def _anew(collected: Iterable[Collected]) -> list[Collected]:
    """Statistics that are to see all data once more."""
    found = list(collected)
    for c in found:
        c.start_anew()
    return found


def _few(batches: Iterator[Batch], crossing: int) -> tuple[list[Batch], Iterator[Batch] | None]:
    """The first batches, and the others; None where these are all, and can be held with what crosses of them."""
    head: list[Batch] = []
    held = 0
    for batch in batches:
        head.append(batch)
        held += sum(getattr(v, "nbytes", 0) for v in batch.values()) + crossing * samples_in(batch)
        if held > HELD_BYTES:
            return head, batches
    return head, None


def _let_go(head: list[Batch], more: Iterator[Batch]) -> Iterator[Batch]:
    """Those at hand, which are let go one by one, and the others."""
    while head:
        yield head.pop(0)
    yield from more
