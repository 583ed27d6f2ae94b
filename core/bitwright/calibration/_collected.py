"""Statistics that are being collected: what they need of each batch, and how they get it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bitwright.backend import Tap
from bitwright.errors import InputError
from bitwright.files import Array
from bitwright.statistics import Request, Source, Statistic


@dataclass(frozen=True)
class Collected:
    """A statistic that is being collected."""

    request: Request
    statistic: Statistic

    @property
    def taps(self) -> tuple[tuple[Source, Tap], ...]:
        """What it is updated with, and the network that it is of."""
        s = self.statistic
        pairs = zip(self.request.sources, self.request.tensors, strict=True)
        step = getattr(s, "step", 1)
        axis = s.axis if step == 1 else getattr(s, "layout", None)
        taps = [(source, Tap(tensor, s.reduction, axis, step)) for source, tensor in pairs]
        if getattr(s, "extremes", False):
            taps += [(source, Tap(tap.tensor, "minmax", s.axis)) for source, tap in taps]
        return tuple(taps)


def taps_of(collected: Iterable[Collected]) -> dict[Source, dict[Tap, None]]:
    """All that has to be taken from each network."""
    wanted: dict[Source, dict[Tap, None]] = {}
    for c in collected:
        for source, tap in c.taps:
            wanted.setdefault(source, {})[tap] = None
    return wanted


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
    # Every task is waited for, so that none still runs, and which error is raised doesn't depend on timing.
    tasks = [pool.submit(_update, c, values, batch) for c in collected]
    errors = [task.exception() for task in tasks]
    if error := next((e for e in errors if e is not None), None):
        raise error


def _update(collected: Collected, values: Mapping[Source, Mapping[Tap, Array]], batch: int) -> None:
    try:
        collected.statistic.update(*(np.asarray(values[source][tap]) for source, tap in collected.taps))
    except InputError as error:
        names = ", ".join(f"{t!r}" for t in dict.fromkeys(collected.request.tensors))
        networks = " and ".join(dict.fromkeys(collected.request.sources))
        raise InputError(f"tensor {names} ({networks} network, batch {batch}): {error}") from error
