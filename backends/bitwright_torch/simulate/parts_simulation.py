"""Simulation of a model that is captured in parts: each part is simulated, the Python around them stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from bitwright.backend import Session, SimulationBase, Tap, Training
from bitwright.graph import TensorId
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Plan, SiteId
from bitwright_torch.capture.parts import PartitionedModel, parts_graph
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.model import CapturedModel
from bitwright_torch.simulate.parts_session import Opener, PartitionedSession, segment_of
from bitwright_torch.simulate.simulation import TorchSimulation


class PartitionedSimulation(SimulationBase):
    """`bitwright.backend.Simulation` of a `PartitionedModel`.

    Args:
        model: the float model; never changed.
        plan, encodings: of all parts.
        trainable: as `TorchSimulation`.

    Raises:
        EncodingError: an encoding is for an unknown or float site, or doesn't fit its tensor.
    """

    def __init__(
        self,
        model: PartitionedModel,
        plan: Plan,
        encodings: EncodingTable,
        *,
        trainable: bool | Training = False,
    ) -> None:
        super().__init__(parts_graph(model), plan, encodings)
        self._float = model
        self._sites.changes(encodings)
        self._simulations: dict[str, TorchSimulation] = {}
        for name, part in model.parts.items():
            sites = sites_of(part)
            own = plan_of_part(plan, sites)
            table = EncodingTable({s: e for s, e in encodings.items() if s in sites})
            self._simulations[name] = TorchSimulation(part, own, table, trainable=trainable)
        self._model: PartitionedModel | None = None

    @property
    def model(self) -> PartitionedModel:
        """The user's model with simulated parts."""
        if self._model is None:
            self._model = _own(self._float).with_parts({n: s.model for n, s in self._simulations.items()})
        return self._model

    def install(self, changes: Mapping[SiteId, Encoding | None]) -> None:
        """See `SimulationBase`."""
        for name, simulation in self._simulations.items():
            sites = sites_of(self._float.parts[name])
            simulation.install({s: e for s, e in changes.items() if s in sites})

    def in_force(self) -> Mapping[SiteId, Encoding | None]:
        """See `SimulationBase`."""
        return {s: e for simulation in self._simulations.values() for s, e in simulation.in_force().items()}

    def open(self, taps: Sequence[Tap], feeds: tuple[TensorId, ...] | None) -> Session:
        """See `SimulationBase`; a segment as `parts.segment_of`."""
        if feeds is None:
            return PartitionedSession(self.model, self._graph, taps, self._opener())
        return segment_of(self.model, self._graph, feeds, taps, self._opener())

    def float_model(self) -> PartitionedModel:
        """The float model with the present weights and running statistics."""
        return _own(self.model).with_parts({n: s.float_model() for n, s in self._simulations.items()})

    def _opener(self) -> Opener:
        return lambda name, taps, feeds: (
            self._simulations[name].session(taps) if feeds is None else self._simulations[name].segment(feeds, taps)
        )


def _own(model: PartitionedModel) -> PartitionedModel:
    """The model without its parts, and with memory of its own: training it must not change the float model."""
    made = model.with_parts({name: nn.Identity() for name in model.parts})
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data = tensor.data.clone()
    return made


def sites_of(part: CapturedModel) -> frozenset[SiteId]:
    """Tensors and parameters of a part, under the names that they have in the whole."""
    graph = canonical(part).graph
    return frozenset((*graph.tensors, *graph.params))


def plan_of_part(plan: Plan, sites: frozenset[SiteId]) -> Plan:
    """The plan of one part. No grid is shared over the Python between parts, so nothing points out of it."""
    observed = {s: plan.observed(s) for s in plan if s in sites and plan.root(s) == s}
    return Plan({s: site for s, site in plan.items() if s in sites}, plan.target, plan.scheme,
                weight_scheme=plan.weight_scheme, observed=observed, notes=plan.notes)  # fmt: skip
