"""Running a simulation, also after it was built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from bitwright.backend import Batch, Tap
from bitwright.graph import TensorId
from bitwright_keras.simulate.session import KerasSession


class Reopened(Protocol):
    """A simulation whose network may be built again."""

    @property
    def generation(self) -> int:
        """How often the network has been built."""

    def opened(self, taps: Sequence[Tap], feeds: Sequence[TensorId] | None) -> tuple[int, KerasSession]:
        """A session of the network as it is now, with the number of its building."""


class SimulationSession:
    """A session that is compiled again where the simulation was built again."""

    def __init__(self, simulation: Reopened, taps: Sequence[Tap], feeds: Sequence[TensorId] | None) -> None:
        self._simulation, self._taps, self._feeds = simulation, taps, feeds
        self._generation, self._session = simulation.opened(taps, feeds)

    def run(self, batch: Batch) -> Mapping[Tap, NDArray[Any]]:
        """As `KerasSession.run`."""
        if self._generation != self._simulation.generation:
            self._generation, self._session = self._simulation.opened(self._taps, self._feeds)
        return self._session.run(batch)
