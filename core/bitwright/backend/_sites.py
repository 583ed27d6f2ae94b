"""The sites of a simulation, as every backend needs them: where ops go, what is installed, what is in force."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from bitwright.backend._checks import check_encoding, on_grid
from bitwright.graph import Graph, ParamId, TensorId
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Plan, SiteId, SiteKind


class Sites:
    """The quantized sites of a simulated model.

    Args:
        graph: of the float model.
        plan: what is quantized.
        encodings: that the simulation starts with; their provenance is handed on.
    """

    def __init__(self, graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding | None]) -> None:
        self.graph, self.plan = graph, plan
        self._provenance = encodings.provenance if isinstance(encodings, EncodingTable) else ()

    def is_parameter(self, site: SiteId) -> bool:
        """Whether a site of the plan is a parameter."""
        return self.plan[site].kind is SiteKind.PARAMETER

    @cached_property
    def rounded(self) -> tuple[TensorId, ...]:
        """Activations that need an op, as their values aren't on the grid yet."""
        activations = (s for s in self.plan.quantized if not self.is_parameter(s) and s in self.graph.tensors)
        return tuple(s for s in activations if not on_grid(self.graph, self.plan, s))

    @cached_property
    def parameters(self) -> tuple[ParamId, ...]:
        """Quantized parameters."""
        return tuple(s for s in self.plan.quantized if self.is_parameter(s))

    def changes(self, encodings: Mapping[SiteId, Encoding | None]) -> dict[SiteId, Encoding | None]:
        """What `Simulation.set` installs, by root site; None bypasses. All are checked before it returns.

        Raises:
            EncodingError: unknown site, a site that the plan keeps in float, or an encoding that doesn't fit.
        """
        return self.plan.by_root(encodings, lambda s, e: check_encoding(self.graph, self.plan, s, e))

    def table(self, by_root: Mapping[SiteId, Encoding | None]) -> EncodingTable:
        """What `Simulation.get` gives: the encodings in force, at roots and at the sites that share with them."""
        return EncodingTable(self.plan.by_site(by_root), self._provenance)
