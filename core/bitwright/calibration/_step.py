"""One part of a network, the statistics that are finished behind it, and what goes on to the parts behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from bitwright.backend import Backend, Batch, Part, PartialExecution, Session, Tap, parts_of, reduced
from bitwright.calibration._collected import Collected, taps_of, update_all
from bitwright.files import Array
from bitwright.graph import Graph, TensorId
from bitwright.statistics import Source

OpenSession = Callable[[Source, Sequence[Tap]], Session]
OpenPart = Callable[[Source, Part, Sequence[TensorId] | None, Sequence[Tap]], Session]
"""Compiles a part of the float or the simulated network for taps and what it is fed (None: the network's inputs)."""


@dataclass(frozen=True)
class InParts:
    """How a network is run part by part.

    Attributes:
        graph: of the network.
        parts: of it, in their order; one where it is small enough to be run as a whole.
        open: compiles a part, the first one too.
    """

    graph: Graph
    parts: Sequence[Part]
    open: OpenPart


def in_parts(backend: Backend[Any], graph: Graph, open: OpenPart) -> InParts | None:
    """How `collect` runs a network part by part; None where its backend runs no parts."""
    return InParts(graph, parts_of(graph), open) if isinstance(backend, PartialExecution) else None


@dataclass(frozen=True)
class Step:
    """A part of a network, run for some statistics.

    Attributes:
        divided: the network; `parts` of it may be others than its own.
        parts: into which it is cut, in order.
        index: of the part.
        here: statistics whose last tensor the part computes.
        kept: what is kept of each network for the parts behind.
        wanted: all that is taken of each network.
    """

    divided: InParts
    parts: Sequence[Part]
    index: int
    here: Sequence[Collected]
    kept: Mapping[Source, Sequence[TensorId]]
    wanted: Mapping[Source, Mapping[Tap, None]] = field(init=False)

    def __post_init__(self) -> None:
        wanted = taps_of(self.here)
        for source, tensors in self.kept.items():
            wanted.setdefault(source, {}).update((Tap(t), None) for t in tensors)
        object.__setattr__(self, "wanted", wanted)

    def opened(self) -> dict[Source, Session]:
        """What computes it, of each network of which anything is computed."""
        part = self.parts[self.index]
        sessions: dict[Source, Session] = {}
        for source, taps in self.wanted.items():
            computed = tuple(tap for tap in taps if tap.tensor in part.computed)
            # Sizes are often computed from the inputs, which therefore stay at hand.
            feeds = tuple(dict.fromkeys([*part.crossing, *self.divided.graph.inputs])) if self.index else None
            if computed:
                sessions[source] = self.divided.open(source, part, feeds, computed)
        return sessions

    def run(
        self, sessions: Mapping[Source, Session], batch: Batch, given: Mapping[Source, Batch]
    ) -> dict[Source, dict[Tap, Array]]:
        """What is taken of each network of a batch.

        Args:
            sessions: see `opened`.
            batch: the model's inputs.
            given: of each network, what was kept of this batch before the part.

        Raises:
            BitwrightError: a network can't be run on this batch, or not on this part of it.
        """
        values: dict[Source, dict[Tap, Array]] = {}
        for source, taps in self.wanted.items():
            own = given.get(source, {})
            found = sessions[source].run({**batch, **own}) if source in sessions else {}
            values[source] = {tap: found[tap] if tap in found else reduced(own[tap.tensor], tap) for tap in taps}
        return values

    def take(
        self, values: Mapping[Source, Mapping[Tap, Array]], pool: ThreadPoolExecutor, number: int
    ) -> dict[Source, dict[TensorId, Array]]:
        """Update the statistics with a batch; returned is what goes on.

        Args:
            values: see `run`.
            pool: where statistics are updated.
            number: of the batch, for messages.

        Raises:
            InputError: a tensor holds NaN or infinity.
        """
        update_all(pool, self.here, values, number)
        return {source: {t: values[source][Tap(t)] for t in tensors} for source, tensors in self.kept.items()}


class Places:
    """At which of its parts each statistic of a network is updated.

    Args:
        collected: the statistics.
        parts: of the network.
    """

    def __init__(self, collected: Sequence[Collected], parts: Sequence[Part]) -> None:
        self._parts = parts
        self._part_of = {t: i for i, part in enumerate(parts) for t in part.computed}
        self._homes = [(c, max(self._part_of.get(tap.tensor, 0) for _, tap in c.taps)) for c in collected]

    @property
    def last(self) -> int:
        """Behind this part nothing is updated; −1 without statistics."""
        return max((home for _, home in self._homes), default=-1)

    def at(self, index: int) -> list[Collected]:
        """Those that are updated at a part."""
        return [c for c, home in self._homes if home == index]

    def kept(self, index: int) -> dict[Source, list[TensorId]]:
        """What is kept behind a part of each network, for the parts behind it and for statistics updated there."""
        found: dict[Source, list[TensorId]] = {}
        for source, taps in taps_of(self._behind(index)).items():
            early = (tap.tensor for tap in taps if self._part_of.get(tap.tensor, 0) <= index)
            found[source] = list(dict.fromkeys([*self._parts[index + 1].crossing, *early]))
        return found

    def _behind(self, index: int) -> Iterable[Collected]:
        return (c for c, home in self._homes if home > index)
