"""Placement: a graph and a target become a plan. Pure, deterministic, the same for every backend.

The configuration's sections are applied in AIMET's order, later ones winning: `defaults`, `params`, `op_type`,
`supergroups` and graph passes, `model_input`, `model_output`, per-channel flags, then hardware exceptions. The user's
overrides go before all of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitwright.errors import TargetError
from bitwright.graph import Graph, ParamId, ParamRole
from bitwright.grids import QuantSpec, parse_scheme
from bitwright.placement import _ties as ties
from bitwright.placement._activations import ActivationPlacement
from bitwright.placement._hardware import apply_exceptions
from bitwright.placement._known_ranges import compared, known_ranges, scheme_for
from bitwright.placement._overrides import parse_overrides
from bitwright.placement._pairs import limited_pairs
from bitwright.placement._parameters import ParameterPlacement, SpecOf, linear_biases
from bitwright.placement._plan import Decision, Float, Fused, Plan, SharedWith, Site, SiteId, SiteKind
from bitwright.placement._types import KeyValueType, Precision, activation_spec
from bitwright.targets import NumberType, Target, load_target

Override = str | Mapping[str, str]


def build_plan(
    graph: Graph,
    target: Target | str | Path,
    *,
    weights: str | None = None,
    activations: str | None = None,
    scheme: str = "sqnr",
    weight_scheme: str = "minmax",
    overrides: Mapping[str, Override] | None = None,
    kv_cache: str | None = None,
) -> Plan:
    """Decide every quantizable site of a graph.

    Args:
        graph: the model.
        target: a preset's name, a configuration file, or a loaded target.
        weights: type of weights ("int8", "int4:block32", "int4:lpbq64", "float16", …); None takes the target's.
            Blocks that don't divide a weight's inputs fall back to one scale a channel, noted in `Plan.notes`, and in
            `Plan.unblocked` where the layer has more inputs than a block.
            Only the weights of convolutions and linear ops go below 8 bits; one that an embedding shares has 8.
            "float" leaves parameters in float.
        activations: type of activations ("uint8", "uint16", "float16", …); None takes the target's. "float" quantizes
            weights only: of linear, recurrent and embedding ops, while norms and constants stay in float too.
            "int8:per_token", "uint8:dynamic" and the like have their ranges at run time: beside the weights they
            quantize what convolutions and linear ops with weights read, and nothing else. Per token, one scale for
            each row of the last axis; what convolutions read has one for the whole tensor then.
        scheme: calibration scheme of activations.
        weight_scheme: calibration scheme of parameters.
        overrides: exceptions by op or site, see `_overrides.parse_overrides`.
        kv_cache: type of the keys and values of attention, whatever `activations` says: "int8" (one scale for each
            tensor), "int8:per_head", "int4:per_token" (one for each head of each token, at run time), "float16", ….

    Raises:
        TargetError: the target is invalid, or contradicts itself on this graph (both ops are named).
        InputError: a type or an override isn't understood, or there is no attention for `kv_cache`.
    """
    target = load_target(target)
    weight_type = Precision.or_float(weights, target.weights)
    if weight_type is not None:
        weight_type = weight_type.for_weights(weights)
    activation_type = Precision.or_float(activations, target.activations)
    if activation_type is not None:
        activation_type = activation_type.for_activations(activations)
    exceptions = parse_overrides(graph, overrides or {})
    kept = None if kv_cache is None else KeyValueType.of(kv_cache, target.activations)
    placement = ActivationPlacement(graph, target, exceptions, activation_type, kept)
    shared = ties.resolve(placement.drafts, ties.propagate(placement))
    decisions: dict[SiteId, Decision] = {}
    ranges = known_ranges(graph) if parse_scheme(scheme)[0] == "sqnr" else None
    scores = frozenset() if ranges is None else compared(graph)
    for t, draft in placement.drafts.items():
        if not draft.on:
            decisions[t] = Float(draft.reason) if draft.into is None else Fused(draft.reason, draft.into)
        elif t in shared.parent:
            decisions[t] = SharedWith(shared.parent[t])
        else:
            members = shared.members(t) or (t,)
            limits = draft.limits if len(shared.observed.get(t, (t,))) == 1 else None
            symmetric = _symmetric(placement, members)
            precision = draft.precision or activation_type
            assert precision is not None  # where activations stay in float, only an exception's is on
            spec = activation_spec(target, precision, symmetric=symmetric, limits=limits)
            if ranges is not None and precision.dynamic is None:
                seen = shared.observed.get(t, (t,))
                spec = spec.with_(scheme=scheme_for(graph, ranges, scores, members, seen))
            decisions[t] = spec

    def root_of(site: SiteId) -> SiteId:
        while isinstance(decision := decisions[site], SharedWith):
            site = decision.site
        return site

    def spec_of(site: SiteId) -> QuantSpec | None:
        decision = decisions[root_of(site)]
        return decision if isinstance(decision, QuantSpec) else None

    notes = placement.notes
    params = ParameterPlacement(placement, spec_of, weight_type, activation_type, notes)
    biases = linear_biases(graph, params)
    used = [p for p in graph.params if graph.users(p)]
    decisions.update({p: params.decide(p) for p in used if p not in biases})
    apply_exceptions(placement, decisions, notes)
    for t, table in placement.lookups.items():
        if isinstance(decisions[t], QuantSpec) and placement.drafts[t].precision is None:
            known = isinstance(decisions[table], QuantSpec)
            decisions[t] = SharedWith(table) if known else Float("neither the target nor its table gives it a grid")
    if target.config.bitwright.pair_sum_bits is not None:
        decisions.update(limited_pairs(graph, decisions, spec_of))
    decisions.update({p: params.bias(p, spec_of, root_of) for p in used if p in biases})
    decisions.update(_unfused(decisions, spec_of))
    notes += _outside_kernels(graph, target, spec_of)
    mirrored = _mirrored(graph, weights, spec_of)
    return Plan(
        _sites(graph, decisions),
        target.name,
        scheme,
        weight_scheme=weight_scheme,
        observed=shared.observed,
        notes=tuple(dict.fromkeys(notes)),
        unblocked=params.unblocked,
        mirrored=mirrored,
    )


def _unfused(decisions: Mapping[SiteId, Decision], spec_of: SpecOf) -> dict[SiteId, Float]:
    """Parts of fused ops whose result has no grid either: these are computed in float."""
    found = {}
    for site, decision in decisions.items():
        end = decision
        while isinstance(end, Fused) and isinstance(further := decisions.get(end.into), Fused):
            end = further
        if isinstance(decision, Fused) and isinstance(end, Fused) and spec_of(end.into) is None:
            found[site] = Float(decision.reason)
    return found


def _mirrored(graph: Graph, weights: str | None, spec_of: SpecOf) -> tuple[ParamId, ...]:
    """Weights of linear ops that were asked to be of an unsigned type, and whose grid the target makes symmetric."""
    if weights is None or not weights.strip().lower().startswith("u"):
        return ()
    found = dict.fromkeys(op.weight for op in graph.linear_ops if op.weight is not None)
    specs = {w: spec_of(w) for w in found}
    return tuple(w for w, spec in specs.items() if spec is not None and spec.symmetric and not spec.signed)


def _symmetric(placement: ActivationPlacement, members: tuple[SiteId, ...]) -> bool:
    """Symmetry of a group of tied tensors: what `op_type` says of any member, or the default."""
    said = {m: draft for m in members if (draft := placement.drafts[m].symmetric) is not None}
    if len(set(said.values())) > 1:
        yes, no = (next(m for m, s in said.items() if s is value) for value in (True, False))
        raise TargetError(
            f"{placement.target.source}: op_type makes tensor {yes!r} symmetric and {no!r} asymmetric, but they share "
            "one grid; give both the same is_symmetric, or take the op that ties them out of bitwright.ties"
        )
    default = bool(placement.config.defaults.ops.is_symmetric)
    return next(iter(said.values()), default)


def _outside_kernels(graph: Graph, target: Target, spec_of: SpecOf) -> list[str]:
    """Linear ops whose widths are not among the target's `supported_kernels`."""
    notes = []
    for op in graph.linear_ops:
        kernels = target.kernels(target.type_of(op))
        inputs, weight = spec_of(op.data_inputs[0]), spec_of(op.params[ParamRole.WEIGHT])
        if not kernels or inputs is None or weight is None:
            continue
        pairs = [(_number(k.activation), None if k.param is None else _number(k.param)) for k in kernels]
        asked = (_describe(inputs), _describe(weight))
        if not any(a == asked[0] and w in (None, asked[1]) for a, w in pairs):
            known = ", ".join(f"{a} × {w or 'any'}" for a, w in pairs)
            notes.append(f"{op.id}: the target has no {op.type} kernel for {asked[0]} × {asked[1]}, only {known}")
    return notes


def _describe(spec: QuantSpec) -> str:
    return f"{'int' if spec.float_format is None else 'float'}{spec.bits}"


def _number(number: NumberType) -> str:
    return f"{number.dtype}{number.bitwidth}"


def _sites(graph: Graph, decisions: Mapping[SiteId, Decision]) -> dict[SiteId, Site]:
    """Sites in topological order: model inputs, then each op's parameters and outputs."""
    sites = {t: Site(t, SiteKind.ACTIVATION, decisions[t]) for t in graph.inputs}
    for op in graph:
        for role, p in op.params.items():
            sites.setdefault(p, Site(p, SiteKind.PARAMETER, decisions[p], op.id, role))
        for t in op.outputs:
            sites[t] = Site(t, SiteKind.ACTIVATION, decisions[t], op.id)
    return sites
