"""Properties of placement on random graphs: no circles, every site decided, ties that cover, determinism."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitwright.graph import Op, OpKind
from bitwright.grids import QuantSpec
from bitwright.placement import Derived, Float, SharedWith, SiteKind, build_plan
from bitwright.targets import load_target, target_names
from bitwright.testing.builder import Builder

MOVES = ("conv bn relu clip sigmoid opaque pool average identity add mul scale concat transpose reshape").split()  # noqa: SIM905


@st.composite
def graphs(draw):
    b = Builder()
    tensors = [b.input("x0", 2, 4, 4)]
    if draw(st.booleans()):
        tensors.append(b.input("x1", 2, 4, 4))
    for i in range(draw(st.integers(1, 14))):
        move = draw(st.sampled_from(MOVES))
        pick = lambda: tensors[draw(st.integers(max(0, len(tensors) - 4), len(tensors) - 1))]
        x, n = pick(), f"{move}{i}"
        tensors.append(step(b, move, n, x, pick))
    ends = draw(st.sets(st.sampled_from(tensors[-3:]), min_size=1))
    used = {t for op in b._ops for t in op.inputs}
    return b.build(*dict.fromkeys([*sorted(ends), *(t for t in tensors if t not in used)])).graph


def step(b, move, n, x, pick):
    match move:
        case "conv":
            return b.conv(n, x, 2, pad=1)
        case "bn":
            return b.batch_norm(n, x)
        case "relu":
            return b.relu(n, x)
        case "clip":
            return b.clip(n, x)
        case "sigmoid":
            return b.activation(n, x, "Sigmoid")
        case "opaque":
            return b.opaque(n, x)
        case "pool":
            return b.pool(n, x, 3, pad=1)
        case "average":
            return b.pool(n, x, 3, pad=1, type="Average")
        case "identity":
            return b.identity(n, x)
        case "add" | "mul":
            return b.binary(n, move.title(), x, pick())
        case "scale":
            return b.binary(n, "Mul", x, np.ones(1))
        case "concat":
            joined = b.concat(f"{n}j", [x, pick(), pick()])
            return b.conv(n, joined, 2, 1)
        case "transpose":
            return b.transpose(n, x, 0, 1, 3, 2)
        case _:
            return b.reshape(n, x, 2, 4, 4)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs(), st.sampled_from(target_names()), st.data())
def test_plans_are_sound(graph, target, data):
    names = sorted({*(op.id for op in graph), *graph.tensors})
    floats = data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
    overrides = dict.fromkeys(floats, "float")
    plan = build_plan(graph, target, overrides=overrides)
    again = build_plan(graph, target, overrides=overrides)
    assert [(s, x) for s, x in plan.items()] == [(s, x) for s, x in again.items()]
    assert plan.notes == again.notes and plan.table() == again.table()
    weights_alone = load_target(target).config.bitwright.activations == "float"
    assert not (weights_alone and any(plan.spec(tensor) is not None for tensor in graph.tensors))
    used = {p for op in graph for p in op.params.values()}
    assert set(plan) == set(graph.tensors) | used
    for site, info in plan.items():
        assert info.kind is (SiteKind.ACTIVATION if site in graph.tensors else SiteKind.PARAMETER)
        root = plan.root(site)  # raises on circles
        decision = plan[root].decision
        assert isinstance(decision, QuantSpec) or root == site
        if isinstance(info.decision, Float):
            assert info.decision.reason
        if isinstance(info.decision, Derived):
            assert all(plan.spec(s) is not None for s in info.decision.sites)
        if isinstance(info.decision, SharedWith):
            assert site in plan.tied(root)
    for root in plan.activations:
        observed = plan.observed(root)
        assert observed[0] == root and all(plan.root(t) == root for t in observed)
        assert plan.tied(root)[0] == root
    for op in graph:
        moves_only = op.kind in (OpKind.MAX_POOL, OpKind.IDENTITY, OpKind.TRANSPOSE, OpKind.RESHAPE)
        if moves_only and plan.spec(op.inputs[0]) is not None and plan.spec(op.output) is not None:
            assert plan.root(op.output) == plan.root(op.inputs[0])
        if op.kind is OpKind.CONV and op.id not in overrides and op.inputs[0] not in overrides:
            assert weights_alone or quantized_or_fused(plan, op)


def quantized_or_fused(plan, conv: Op):
    """A convolution reads integers unless its input lies inside a fused group, or behind what the user keeps float."""
    decision = plan[conv.inputs[0]].decision
    return plan.spec(conv.inputs[0]) is not None or "inside" in decision.reason or "stays in float" in decision.reason


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_observed_tensors_cover_their_group(graph):
    """Each tied tensor's values come from an observed tensor through ops that tie, or flow into one."""
    plan = build_plan(graph, "default")
    for root in plan.activations:
        covered = set(plan.observed(root))
        for op in graph:  # moving ops hand values forward
            if plan.root(op.output) == root and op.kind is not OpKind.CONCAT and covered & set(op.inputs):
                covered.add(op.output)
        for op in reversed(graph.ops):  # concatenations hold their inputs' values
            if op.kind is OpKind.CONCAT and op.output in covered:
                covered |= set(op.inputs)
        for op in graph:
            if plan.root(op.output) == root and op.kind is not OpKind.CONCAT and covered & set(op.inputs):
                covered.add(op.output)
        assert covered >= set(plan.tied(root))
