"""What mixed precision chooses between, and for whom: candidate types, and groups of sites that must agree."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bitwright.errors import InputError
from bitwright.graph import OpId, OpKind, ParamRole
from bitwright.grids import QuantSpec, block_scales, parse_type
from bitwright.placement import SiteId
from bitwright.simulation import QuantSim
from bitwright.targets import Kernel

FLOAT = "float"
"""Activations that aren't quantized."""
COSTED = frozenset({OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.LINEAR, OpKind.MATMUL})
"""Ops that are matrix products."""


@dataclass(frozen=True)
class Candidate:
    """Types of a group's weights and activations."""

    weights: str
    activations: str

    @property
    def weight_bits(self) -> int:
        """Width of a weight's code."""
        return parse_type(self.weights)[0]

    @property
    def activation_bits(self) -> int:
        """Width of an activation's code; of "float" 32."""
        return _width(self.activations)[0]

    def __str__(self) -> str:
        return f"{self.weights} × {self.activations}"


def read_candidates(given: Sequence[tuple[str, str] | str | Candidate]) -> tuple[Candidate, ...]:
    """Candidates as users write them: ("int4", "uint8"), or "int4 × uint8", "int4xuint8", "int4/uint8".

    Raises:
        InputError: fewer than two, one twice, or not types.
    """
    found = []
    for item in given:
        if isinstance(item, Candidate):
            pair: Sequence[str] = (item.weights, item.activations)
        elif isinstance(item, str):
            pair = [part.strip() for part in item.replace("×", "/").replace("x", "/").split("/")]
        else:
            pair = tuple(item)
        if len(pair) != 2:
            raise InputError(f"candidate {item!r}: give a pair of types, such as ('int4', 'uint8')")
        if pair[1] != FLOAT and parse_type(pair[1])[3] is not None:
            raise InputError(
                f"candidate {item!r}: blocks are for weights, and ranges at run time aren't searched; activations have "
                "one scale"
            )
        parse_type(pair[0])
        found.append(Candidate(*pair))
    if len(set(found)) < 2 or len(set(found)) != len(found):
        raise InputError("mixed precision needs at least two different candidates, such as int8/uint8 and int4/uint8")
    if len({c.activations for c in found}) > 1 and any(c.activations == FLOAT for c in found):
        raise InputError(
            "candidates: activations in float are for all candidates or none, such as int8/float,int4/float"
        )
    return tuple(found)


@dataclass(frozen=True)
class Group:
    """Sites that have one candidate together.

    Attributes:
        name: of its first op.
        weights: parameters.
        activations: sites with an encoding of their own.
        ops: those whose cost depends on the group.
        allowed: candidates that the target has kernels for, by index.
    """

    name: str
    weights: tuple[SiteId, ...]
    activations: tuple[SiteId, ...]
    ops: tuple[OpId, ...]
    allowed: tuple[int, ...]

    def types(self, sim: QuantSim, candidate: Candidate) -> dict[SiteId, str]:
        """The type of every site of the group, and of those that share a grid with one."""
        found = dict.fromkeys(self.weights, candidate.weights)
        for root in self.activations:
            found |= dict.fromkeys(sim.plan.tied(root), candidate.activations)
        return found


def group_sites(sim: QuantSim, candidates: Sequence[Candidate]) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """Groups in the order of the network, and notes on what was left alone.

    Where all candidates have the same activations, and the network has them already, each weight is a group.
    Otherwise an op's weight and all the activations that it reads are one: nothing converts between widths in front of
    an op, so what it reads has one. An activation that several ops read joins theirs.
    """
    graph, plan = sim.graph, sim.plan
    shared = shared_activations(candidates)
    if shared == FLOAT and plan.activations:
        raise InputError(
            f"candidates have activations in float, and the network quantizes some, such as {plan.activations[0]!r}: "
            'open it with activations="float"'
        )
    parent: dict[SiteId, SiteId] = {}

    def top(site: SiteId) -> SiteId:
        while parent[site] != site:
            parent[site] = parent[parent[site]]
            site = parent[site]
        return site

    members: dict[OpId, list[SiteId]] = {}
    for op in graph:
        weight = op.params.get(ParamRole.WEIGHT)
        sites = [weight] if weight in plan.parameters and op in graph.linear_ops else []
        if op.kind is not OpKind.OPAQUE:
            roots = [plan.root(t) for t in op.data_inputs]
            sites += [r for r in dict.fromkeys(roots) if r in plan.activations and not _has(plan.spec(r), shared)]
        for site in sites:
            assert site is not None
            parent.setdefault(site, site)
            parent[top(site)] = top(str(sites[0]))
        if sites:
            members[op.id] = [str(s) for s in sites]
    gathered: dict[SiteId, list[OpId]] = {}
    for op_id, sites_of in members.items():
        gathered.setdefault(top(sites_of[0]), []).append(op_id)
    sites_by_top: dict[SiteId, list[SiteId]] = {}
    for site in parent:
        sites_by_top.setdefault(top(site), []).append(site)
    groups, notes = [], []
    for root, ops in gathered.items():
        found = sites_by_top[root]
        own = tuple(s for s in found if s in graph.params)
        allowed = tuple(i for i, c in enumerate(candidates) if all(_runs(sim, op, c, found) for op in ops))
        name = next((o for o in ops if graph.op(o).weight in own), ops[0])
        if not allowed:
            notes.append(f"{name}: the target has a kernel for none of the candidates; it keeps its types")
            continue
        groups.append(Group(name, own, tuple(s for s in found if s not in own), tuple(ops), allowed))
    if not groups:
        raise InputError("the target quantizes nothing that could have mixed precision in this model")
    return tuple(groups), tuple(notes)


def shared_activations(candidates: Sequence[Candidate]) -> str | None:
    """The activations' type that all candidates have; None where they differ in it."""
    types = {c.activations for c in candidates}
    return types.pop() if len(types) == 1 else None


def _has(spec: QuantSpec | None, text: str | None) -> bool:
    """Whether a site has a type already, so that nothing is to be decided on it."""
    if spec is None or text is None:
        return False
    bits, signed, float_format, _ = parse_type(text)
    if float_format is not None or spec.float_format is not None:
        return (spec.float_format, spec.scale_type) == (float_format, block_scales(text))
    return (spec.bits, spec.signed) == (bits, signed)


def _runs(sim: QuantSim, op_id: OpId, candidate: Candidate, members: Collection[SiteId]) -> bool:
    """Whether the target lists a kernel for a candidate."""
    op = sim.graph.op(op_id)
    varies = op.kind in COSTED and sim.plan.root(op.data_inputs[0]) in members
    return runs_kernel(
        sim,
        op_id,
        activation=candidate.activations if varies else None,
        weight=candidate.weights if op.weight is not None else None,
    )


def runs_kernel(sim: QuantSim, op_id: OpId, *, activation: str | None = None, weight: str | None = None) -> bool:
    """Whether the target lists a kernel for an op's types; a target that lists none runs everything.

    Args:
        sim: the network.
        op_id: the op.
        activation, weight: types in place of those that its input and weight have.
    """
    op = sim.graph.op(op_id)
    kernels = sim.target.kernels(sim.target.type_of(op)) if op.kind in COSTED else ()
    if not kernels:
        return True
    inputs = _width(activation) if activation is not None else _present(sim.plan.spec(op.data_inputs[0]))
    kernel = None
    if op.weight is not None:
        kernel = _width(weight) if weight is not None else _present(sim.plan.spec(op.weight))
    return any(_fits(k, inputs, kernel) for k in kernels)


def _present(spec: QuantSpec | None) -> tuple[int, str | None]:
    return (32, None) if spec is None else (spec.bits, spec.float_format)


def _width(text: str) -> tuple[int, str | None]:
    if text == FLOAT:
        return 32, None
    bits, _, float_format, _ = parse_type(text)
    return bits, float_format


def _fits(kernel: Kernel, activation: tuple[int, str | None], weight: tuple[int, str | None] | None) -> bool:
    for number, (bits, float_format) in ((kernel.activation, activation), (kernel.param, weight or (0, None))):
        if number is None or (number is kernel.param and weight is None):
            continue
        if number.bitwidth != bits or (number.dtype == "float") != (float_format is not None):
            return False
    return True
