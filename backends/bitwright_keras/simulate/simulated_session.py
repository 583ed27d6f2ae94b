"""Running a simulation, also after it was built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from bitwright.backend import Batch, Tap
from bitwright.graph import TensorId

if TYPE_CHECKING:
    from bitwright_keras.simulate.simulation import KerasSimulation


class SimulationSession:
    """A session that is compiled again where the simulation was built again."""

    def __init__(self, simulation: KerasSimulation, taps: Sequence[Tap], feeds: Sequence[TensorId] | None) -> None:
        self._simulation, self._taps, self._feeds = simulation, taps, feeds
        self._generation, self._session = simulation.opened(taps, feeds)

    def run(self, batch: Batch) -> Mapping[Tap, NDArray[Any]]:
        """As `KerasSession.run`."""
        if self._generation != self._simulation.generation:
            self._generation, self._session = self._simulation.opened(self._taps, self._feeds)
        return self._session.run(batch)
