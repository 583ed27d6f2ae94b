"""Statistics that are being collected: what they need of each batch, and how they get it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bitwright.backend import Batch, PickingSession, Session, Tap
from bitwright.errors import InputError
from bitwright.files import Array
from bitwright.statistics import LayerMoments, Request, Source, Statistic

SMALL = 2**12
"""Values up to which a statistic takes them at once: handing them to a thread takes longer."""


class Collected:
    """A statistic that is being collected: it takes memory from its first batch until it is handed over.

    Attributes:
        request: for it.
        taps: what it is updated with, and the network that it is of.
        picked: whether that is some places of the tensor (`LayerMoments.places`).
        multiplies: whether its updates are products of matrices.
    """

    def __init__(self, request: Request, *, picking: bool = False) -> None:
        self.request = request
        empty = request.make()
        self.picked = picking and isinstance(empty, LayerMoments) and empty.places is not None
        self.taps = _taps(request, empty, picked=self.picked)
        self.multiplies = isinstance(empty, LayerMoments)
        self._statistic: Statistic | None = None

    @property
    def statistic(self) -> Statistic:
        """What it has seen so far."""
        if self._statistic is None:
            self._statistic = self.request.make()
        return self._statistic

    def start_anew(self) -> None:
        """Forget what it has seen."""
        self._statistic = None

    def handed_over(self) -> Statistic:
        """The finished statistic, which isn't held here any more."""
        found, self._statistic = self.statistic, None
        return found


def _taps(request: Request, s: Statistic, *, picked: bool) -> tuple[tuple[Source, Tap], ...]:
    pairs = zip(request.sources, request.tensors, strict=True)
    if picked and isinstance(s, LayerMoments):
        return tuple((source, Tap(tensor, axis=s.place_axis, places=s.places)) for source, tensor in pairs)
    step = getattr(s, "step", 1)
    axis = s.axis if step == 1 else getattr(s, "layout", None)
    taps = [(source, Tap(tensor, s.reduction, axis, step)) for source, tensor in pairs]
    if getattr(s, "extremes", False):
        taps += [(source, Tap(tap.tensor, "minmax", s.axis)) for source, tap in taps]
    return tuple(taps)


def pack(collected: Sequence[Collected], budget: int) -> list[list[Collected]]:
    """Passes whose statistics take no more than the budget together, or are one; first fit in the order given."""
    passes: list[tuple[int, list[Collected]]] = []
    for one in collected:
        memory = one.request.memory
        for i, (used, members) in enumerate(passes):
            if used + memory <= budget:
                members.append(one)
                passes[i] = (used + memory, members)
                break
        else:
            passes.append((memory, [one]))
    return [members for _, members in passes]


def taps_of(collected: Iterable[Collected]) -> dict[Source, dict[Tap, None]]:
    """All that has to be taken from each network."""
    wanted: dict[Source, dict[Tap, None]] = {}
    for c in collected:
        for source, tap in c.taps:
            wanted.setdefault(source, {})[tap] = None
    return wanted


def run(session: Session, batch: Batch, collected: Iterable[Collected]) -> Mapping[Tap, Array]:
    """What a session finds in a batch, the next one for these statistics."""
    first = {
        tap: c.statistic.next_sample
        for c in collected
        if c.picked and isinstance(c.statistic, LayerMoments)
        for _, tap in c.taps
    }
    if not first:
        return session.run(batch)
    assert isinstance(session, PickingSession)
    return session.run_at(batch, first)


def update_all(
    pool: ThreadPoolExecutor,
    collected: Sequence[Collected],
    values: Mapping[Source, Mapping[Tap, Array]],
    batch: int,
) -> None:
    """Update statistics side by side with the values of one batch.

    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    tasks = [None if _size(c, values) <= SMALL else pool.submit(_update, c, values, batch) for c in collected]
    # Every task is waited for, so that none still runs, and which error is raised doesn't depend on timing.
    errors = [
        _error(c, values, batch) if task is None else task.exception() for c, task in zip(collected, tasks, strict=True)
    ]
    if error := next((e for e in errors if e is not None), None):
        raise error


def _size(collected: Collected, values: Mapping[Source, Mapping[Tap, Array]]) -> int:
    return sum(np.size(values[source][tap]) for source, tap in collected.taps)


def _error(collected: Collected, values: Mapping[Source, Mapping[Tap, Array]], batch: int) -> Exception | None:
    """Update a statistic on this thread; what went wrong."""
    try:
        _update(collected, values, batch)
    except Exception as error:
        return error
    return None


def _update(collected: Collected, values: Mapping[Source, Mapping[Tap, Array]], batch: int) -> None:
    try:
        found = [np.asarray(values[source][tap]) for source, tap in collected.taps]
        if collected.picked and isinstance(collected.statistic, LayerMoments):
            collected.statistic.update_picked(*found)
        else:
            collected.statistic.update(*found)
    except InputError as error:
        names = ", ".join(f"{t!r}" for t in dict.fromkeys(collected.request.tensors))
        networks = " and ".join(dict.fromkeys(collected.request.sources))
        raise InputError(f"tensor {names} ({networks} network, batch {batch}): {error}") from error
