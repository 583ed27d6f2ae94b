"""A simulation, whatever the framework: what is checked before anything is installed, and what is handed out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from bitwright.backend._protocols import Session
from bitwright.backend._sites import Sites
from bitwright.backend._taps import Tap
from bitwright.graph import Graph, ParamId, TensorId
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Plan, SiteId


class SimulationBase(ABC):
    """`Simulation` by three primitives: install numbers, tell those in force, open a session.

    Args:
        graph: of the float model.
        plan: the sites.
        encodings: that the simulation starts with; sites without one run in float. The backend installs them.
    """

    def __init__(self, graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding | None]) -> None:
        self._graph, self._plan = graph, plan
        self._sites = Sites(graph, plan, encodings)

    # -- primitives

    @abstractmethod
    def install(self, changes: Mapping[SiteId, Encoding | None]) -> None:
        """Put encodings into force, by root site, None bypassing it; all of them fit."""

    @abstractmethod
    def in_force(self) -> Mapping[SiteId, Encoding | None]:
        """The encodings in force by root site; learned ones as they are now."""

    @abstractmethod
    def open(self, taps: Sequence[Tap], feeds: tuple[TensorId, ...] | None) -> Session:
        """A session of the simulated network, or of what lies between `feeds` and `taps`.

        Raises:
            ModelError: a tap is unknown or can't be computed from the feeds.
        """

    # -- the protocol

    def set(self, encodings: Mapping[SiteId, Encoding | None]) -> None:
        """Install encodings; None bypasses a site. All are checked before the first is installed.

        A site that shares an encoding passes its own on to the root, unless the mapping names the root too.

        Raises:
            EncodingError: unknown site, a site that the plan keeps in float, or an encoding that doesn't fit.
        """
        self.install(self._sites.changes(encodings))

    def get(self) -> EncodingTable:
        """The encodings in force, at roots and at the sites that share with them; learned ones as they are now."""
        return self._sites.table(self.in_force())

    def session(self, taps: Sequence[Tap]) -> Session:
        """Run the simulated network; taps are handed out after their own fake quantization.

        Raises:
            ModelError: a tap is unknown.
        """
        return self.open(taps, None)

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """Only what lies between `feeds` and `taps`; fed tensors are taken as they are given.

        Raises:
            ModelError: a tap can't be computed from the feeds alone.
        """
        return self.open(taps, tuple(feeds))

    def grids_of(self, params: Mapping[ParamId, object]) -> dict[SiteId, Encoding | None]:
        """Encodings in force at the roots of some parameters: to be installed again once their values have changed."""
        roots = {self._plan.root(p) for p in params if p in self._plan}
        return {root: encoding for root, encoding in self.in_force().items() if root in roots}
