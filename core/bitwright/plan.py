"""The plan: which sites of a graph a target quantizes, and how. Pure core, so it is equal on every backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from bitwright.errors import EncodingError
from bitwright.graph import OpId, ParamRole
from bitwright.grid import QuantSpec

SiteId = str
"""A tensor id or a parameter id; backends keep the two sets disjoint."""


class SiteKind(StrEnum):
    """Activations are calibrated on data, parameters on their values."""

    ACTIVATION = "activation"
    PARAMETER = "parameter"


@dataclass(frozen=True, slots=True)
class SharedWith:
    """The site has the encoding of another: its grid passes through (max pooling, reshape) or is tied (concat)."""

    site: SiteId


@dataclass(frozen=True, slots=True)
class Derived:
    """The site's encoding follows from others. Rule "bias": int32, scale = s_input · s_weight, zero point 0."""

    sites: tuple[SiteId, ...]
    rule: str = "bias"


@dataclass(frozen=True, slots=True)
class Float:
    """The site stays in float; `reason` is said to the user in words."""

    reason: str


Decision = QuantSpec | SharedWith | Derived | Float


@dataclass(frozen=True, slots=True)
class Site:
    """One place where a quantizer may sit.

    Attributes:
        id: tensor id or parameter id.
        op: the op that produces the tensor (None for a model input) or owns the parameter.
        role: a parameter's role.
    """

    id: SiteId
    kind: SiteKind
    decision: Decision
    op: OpId | None = None
    role: ParamRole | None = None


class Plan(Mapping[SiteId, Site]):
    """Every quantizable site of one graph for one target, in topological order."""

    def __init__(self, sites: Mapping[SiteId, Site], target: str, scheme: str = "minmax") -> None:
        self._sites = dict(sites)
        self.target = target
        self.scheme = scheme

    def __getitem__(self, site: SiteId) -> Site:
        return self._sites[site]

    def __iter__(self) -> Iterator[SiteId]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def root(self, site: SiteId) -> SiteId:
        """The site whose encoding this one uses: itself, or the end of its chain of `SharedWith`."""
        seen = [site]
        while isinstance(decision := self._sites[seen[-1]].decision, SharedWith):
            if decision.site in seen:
                raise EncodingError(f"sites share encodings in a circle: {' → '.join([*seen, decision.site])}")
            seen.append(decision.site)
        return seen[-1]

    def spec(self, site: SiteId) -> QuantSpec | None:
        """The specification in force at a site, ties followed; None where it is float, derived or unknown."""
        if site not in self._sites:
            return None
        decision = self._sites[self.root(site)].decision
        return decision if isinstance(decision, QuantSpec) else None

    def scheme_of(self, site: SiteId) -> str:
        """The calibration scheme of a site: its own, or the run's."""
        spec = self.spec(site)
        return (spec.scheme if spec is not None else None) or self.scheme

    @cached_property
    def quantized(self) -> tuple[SiteId, ...]:
        """Sites that must have an encoding: specified, shared or derived."""
        return tuple(
            s for s, site in self._sites.items() if not isinstance(self._sites[self.root(s)].decision, Float) and site
        )

    @cached_property
    def activations(self) -> tuple[SiteId, ...]:
        """Activation sites with a specification of their own, to be calibrated on data."""
        return self._own(SiteKind.ACTIVATION)

    @cached_property
    def parameters(self) -> tuple[SiteId, ...]:
        """Parameter sites with a specification of their own, to be calibrated on their values."""
        return self._own(SiteKind.PARAMETER)

    def _own(self, kind: SiteKind) -> tuple[SiteId, ...]:
        return tuple(s for s, x in self._sites.items() if x.kind is kind and isinstance(x.decision, QuantSpec))

    def tied(self, root: SiteId) -> tuple[SiteId, ...]:
        """All sites that use `root`'s encoding, itself first."""
        return self._ties.get(root, (root,))

    @cached_property
    def _ties(self) -> dict[SiteId, tuple[SiteId, ...]]:
        ties: dict[SiteId, list[SiteId]] = {}
        for s in self._sites:
            ties.setdefault(self.root(s), []).append(s)
        return {r: (r, *(s for s in members if s != r)) for r, members in ties.items()}
