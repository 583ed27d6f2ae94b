"""The plan: which sites of a graph a target quantizes, and how. Pure core, so it is equal on every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from functools import cached_property
from typing import TypeVar

from bitwright.errors import EncodingError
from bitwright.graph import OpId, ParamRole
from bitwright.grids import Blockwise, Dynamic, PerChannel, PerTensor, QuantSpec
from bitwright.tables import Table, Tabular

E = TypeVar("E")
SHOWN = 3
"""Weights that a warning names."""
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

    @property
    def told(self) -> str:
        """What is to be said of the site, after its name."""
        return f"stays in float ({self.reason})"


@dataclass(frozen=True, slots=True)
class OwnForms(Float):
    """A bias that ops of different scales share: simulated in float, and int32 on the grid of each op's accumulators.

    `uses` are (input, weight) of these ops; each form has the scale s_input · s_weight, as by `Derived`.
    """

    uses: tuple[tuple[SiteId, SiteId], ...] = ()


@dataclass(frozen=True, slots=True)
class Fused(Float):
    """A part of what the target computes as one op, which rounds its result alone.

    `into` is the site that has the grid: the result of the fused op, or the weight that a parameter is folded into.
    """

    into: SiteId = ""

    @property
    def told(self) -> str:
        """What is to be said of the site, after its name."""
        return f"is fused ({self.reason}; {self.into!r} has the grid)"


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


class Plan(Tabular, Mapping[SiteId, Site]):
    """Every quantizable site of one graph for one target, in topological order.

    Args:
        sites: by id.
        target: the target's name.
        scheme: calibration scheme of activations without one of their own.
        weight_scheme: the same for parameters.
        observed: for roots of ties whose range several tensors span together: those tensors.
        notes: what the user should know of fallbacks and exceptions.
        unblocked: weights that were asked to be in blocks, have the inputs of one, and can't be divided: the reasons.
            Layers with fewer inputs than a block (depthwise ones, the first convolution) aren't among them: one scale
            for all of their inputs is what a block would be.
        mirrored: weights that were asked to be unsigned, and whose grid is symmetric, since the target says so.
    """

    def __init__(
        self,
        sites: Mapping[SiteId, Site],
        target: str,
        scheme: str = "minmax",
        *,
        weight_scheme: str = "minmax",
        observed: Mapping[SiteId, tuple[SiteId, ...]] | None = None,
        notes: tuple[str, ...] = (),
        unblocked: Mapping[SiteId, str] | None = None,
        mirrored: tuple[SiteId, ...] = (),
    ) -> None:
        self._sites = dict(sites)
        self.target = target
        self.scheme = scheme
        self.weight_scheme = weight_scheme
        self.notes = notes
        self.unblocked = dict(unblocked or {})
        self.mirrored = mirrored
        self._observed = dict(observed or {})

    def __getitem__(self, site: SiteId) -> Site:
        return self._sites[site]

    def __iter__(self) -> Iterator[SiteId]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def changed(self, sites: Mapping[SiteId, Site]) -> Plan:
        """The same plan with sites replaced or added."""
        return Plan(
            {**self._sites, **sites},
            self.target,
            self.scheme,
            weight_scheme=self.weight_scheme,
            observed=self._observed,
            notes=self.notes,
            unblocked=self.unblocked,
            mirrored=self.mirrored,
        )

    def doubt_of_signs(self) -> str:
        """What to tell of `mirrored`: the first few weights, how many there are, what their codes stand for; or ""."""
        if not self.mirrored:
            return ""
        spec = self.spec(self.mirrored[0])
        assert spec is not None
        shown = ", ".join(map(repr, self.mirrored[:SHOWN]))
        more = f" and {len(self.mirrored) - SHOWN} more" if len(self.mirrored) > SHOWN else ""
        half = 2 ** (spec.bits - 1)
        return (
            f"weights of unsigned codes have a symmetric grid, since target {self.target!r} asks for one: "
            f"uint{spec.bits} with the zero point {half} stands for what int{spec.bits} does, {-half} … {half - 1} "
            f"steps ({shown}{more}). For grids that follow both ends of the weights take a target whose params have "
            "is_symmetric False, such as w4a16_asymmetric"
        )

    def doubt_of_blocks(self) -> str:
        """What to tell of `unblocked`: the first few weights, how many there are, what they have instead; or ""."""
        if not self.unblocked:
            return ""
        shown = ", ".join(f"{site!r} ({why})" for site, why in list(self.unblocked.items())[:SHOWN])
        more = f" and {len(self.unblocked) - SHOWN} more" if len(self.unblocked) > SHOWN else ""
        specs = [spec for site in self.unblocked if (spec := self.spec(site)) is not None]
        had = sorted({"per channel" if isinstance(s.granularity, PerChannel) else "per tensor" for s in specs})
        return (
            f"weights are quantized {' or '.join(had)} and not in blocks as was asked: {shown}{more}. Take a block "
            "size that divides their inputs, or give these layers a type of their own with overrides"
        )

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

    def weight_scheme_of(self, site: SiteId) -> str:
        """The calibration scheme of a parameter: its own, or the run's."""
        spec = self.spec(site)
        return (spec.scheme if spec is not None else None) or self.weight_scheme

    def observed(self, root: SiteId) -> tuple[SiteId, ...]:
        """Tensors whose values together span the range that `root`'s encoding must cover; usually itself alone.

        Several where ties chain: a tensor that is read by two concatenations ties their outputs together.
        """
        return self._observed.get(root, (root,))

    @cached_property
    def quantized(self) -> tuple[SiteId, ...]:
        """Sites that must have an encoding: specified, shared or derived."""
        return tuple(s for s in self._sites if not isinstance(self._sites[self.root(s)].decision, Float))

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

    def by_root(
        self, encodings: Mapping[SiteId, E | None], check: Callable[[SiteId, E], None]
    ) -> dict[SiteId, E | None]:
        """What a simulation is to install, by the root site that holds each encoding; None bypasses.

        A site that shares an encoding passes its own on to the root, unless the mapping names the root too.

        Args:
            encodings: by site, as `Simulation.set` takes them.
            check: raises where an encoding doesn't fit its site; called for each before anything is installed.

        Raises:
            EncodingError: unknown site, or one that stays in float.
        """
        changes: dict[SiteId, E | None] = {}
        for site, encoding in encodings.items():
            if site not in self._sites:
                raise EncodingError(f"the plan has no site {site!r} to put an encoding on")
            root = self.root(site)
            decision = self._sites[root].decision
            if isinstance(decision, Float):
                if encoding is not None:
                    raise EncodingError(f"{site!r} {decision.told} and takes no encoding")
                continue
            if encoding is not None:
                check(site, encoding)
            if root == site or root not in encodings:
                changes[root] = encoding
        return changes

    def by_site(self, encodings: Mapping[SiteId, E | None]) -> dict[SiteId, E]:
        """The counterpart of `by_root`: what each quantized site has, of encodings by root; bypassed ones are left out.

        Args:
            encodings: by root; None, or no entry, is a bypassed site.
        """
        return {s: e for s in self.quantized if (e := encodings.get(self.root(s))) is not None}

    def tied(self, root: SiteId) -> tuple[SiteId, ...]:
        """All sites that use `root`'s encoding, itself first."""
        return self._ties.get(root, (root,))

    @cached_property
    def _ties(self) -> dict[SiteId, tuple[SiteId, ...]]:
        ties: dict[SiteId, list[SiteId]] = {}
        for s in self._sites:
            ties.setdefault(self.root(s), []).append(s)
        return {r: (r, *(s for s in members if s != r)) for r, members in ties.items()}

    def __repr__(self) -> str:
        return f"Plan({len(self)} sites for {self.target}, {len(self.quantized)} quantized)"

    def table(self) -> tuple[Row, ...]:
        """A row for each site, for display."""
        return tuple(self._row(site) for site in self._sites.values())

    def row(self, site: SiteId) -> Row:
        """The row of one site."""
        return self._row(self._sites[site])

    def as_table(self) -> Table:
        """The rows of `table` under their names."""
        return Table(tuple(f.name for f in fields(Row)), tuple(astuple(row) for row in self.table()))

    def _row(self, site: Site) -> Row:
        op, decision = site.op or "", site.decision
        match decision:
            case Fused(reason):
                return Row(site.id, op, "fused", "", "fused", reason)
            case Float(reason):
                return Row(site.id, op, "float", "", "float", reason)
            case Derived(sources, rule):
                return Row(site.id, op, "int32", "", "derived", f"{rule} of {' and '.join(sources)}")
            case SharedWith(other):
                spec = self.spec(site.id)
                kind, layout = ("float", "") if spec is None else (_type_name(spec), _layout_name(spec))
                return Row(site.id, op, kind, layout, "shared", f"the grid of {other}")
        limits = [f"{n} {v:g}" for n, v in (("min", decision.minimum), ("max", decision.maximum)) if v is not None]
        limits += [] if decision.pair_limit is None else [f"neighbours' codes sum to at most {decision.pair_limit}"]
        limits += [] if decision.scale_type is None else [f"scales in {decision.scale_type}"]
        symmetry = "symmetric" if decision.symmetric else "asymmetric"
        reason = ", ".join([*([] if decision.float_format else [symmetry]), *limits])
        return Row(site.id, op, _type_name(decision), _layout_name(decision), "quantized", reason)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `Plan.table`: what is done at a site, in words."""

    site: SiteId
    op: OpId
    bits: str
    granularity: str
    decision: str
    reason: str


def _type_name(spec: QuantSpec) -> str:
    return spec.float_format or f"{'int' if spec.signed else 'uint'}{spec.bits}"


def _layout_name(spec: QuantSpec) -> str:
    match spec.granularity:
        case PerTensor():
            return "per tensor"
        case PerChannel():
            return "per channel"
        case Blockwise(block_size=size, decompressed_bits=wide):
            return f"blocks of {size}" + (f", {wide}-bit LPBQ" if wide else "")
        case Dynamic(per_token=rows):
            return "per token at run time" if rows else "per tensor at run time"
