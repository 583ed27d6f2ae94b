"""Keys and values of attention: found by what is computed, and given a type of their own."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.errors import InputError
from bitwright.grids import Dynamic, PerChannel, PerTensor
from bitwright.placement import SharedWith, build_plan
from bitwright.placement._key_values import Kept, key_values
from bitwright.testing import models
from bitwright.testing.builder import Builder


def attention(*, cache=False, repeat=False, turned=False):
    """Two heads of four features over six tokens; with keys and values of five earlier ones, or keys turned first."""
    b = Builder(0)
    x = b.input("x", 6, 8, channel_axis=2)

    def heads(name):
        split = b.reshape(f"{name}_split", b.linear(name, x, 8), 6, 2, 4)
        return b.transpose(f"{name}_heads", split, 0, 2, 1, 3)

    def kept(name):
        new = (
            b.binary(f"{name}_moved", "Add", heads(name), np.ones((1, 1, 6, 4), np.float32))
            if name == "k"
            else heads(name)
        )
        if not cache:
            return new
        return b.concat(f"{name}_all", [b.input(f"past_{name}", 2, 5, 4, channel_axis=None), new], axis=2)

    q, k, v = b.binary("scaled", "Mul", heads("q"), np.full(1, 0.5, np.float32)), kept("k"), kept("v")
    if repeat:
        k, v = (
            b.reshape(f"{n}_again", b.reshape(f"{n}_apart", t, 2, 1, 6, 4), 2, 6, 4) for n, t in (("k", k), ("v", v))
        )
    key = b.transpose("kt", k, 0, 1, 3, 2)
    if turned:  # keys first, as einsum writes it: softmax is along the other axis, which is turned
        scores = b.transpose("back", b.matmul("scores", k, b.transpose("qt", q, 0, 1, 3, 2)), 0, 1, 3, 2)
    else:
        scores = b.matmul("scores", q, key)
    mask = np.triu(np.full((6, 11 if cache else 6), -1e9, np.float32), 1)
    scores = b.masked(b.binary("masked", "Add", scores, mask))
    y = b.matmul("mix", b.softmax("softmax", scores), v)
    y = b.reshape("joined", b.transpose("together", y, 0, 2, 1, 3), 6, 8)
    ends = [b.linear("out", y, 8), *([k, v] if cache else [])]
    return b.build(*ends).graph


@pytest.mark.parametrize("how", [{}, {"repeat": True}, {"turned": True}])
def test_they_are_kept_where_heads_have_come_apart(how):
    """Keys after what moves them by their place, values as they are computed; not what repeats or turns them."""
    found = key_values(attention(**how))
    assert found == (Kept("k_moved.output", 1, True), Kept("v_split.output", 2, True))


def test_a_cache_is_what_new_tokens_are_put_behind():
    graph = attention(cache=True)
    assert key_values(graph) == (
        Kept("k_all.output", 1, True, ("past_k", "k_moved.output")),
        Kept("v_all.output", 1, True, ("past_v", "v_heads.output")),
    )
    plan = build_plan(graph, "default", activations="float", kv_cache="int8")
    for name in "kv":
        root = plan.root(f"{name}_all.output")
        assert (plan.spec(root).bits, plan.spec(root).signed) == (8, True)
        assert plan.root(f"past_{name}") == root  # what comes in is on the grid of what went out
        assert any(isinstance(plan[s].decision, SharedWith) for s in (f"past_{name}", f"{name}_all.output"))
    rows = build_plan(graph, "default", activations="float", kv_cache="int4:per_token")
    assert {s: str(rows.spec(s).run_time) for s in rows.activations} == dict.fromkeys(
        ("k_all.output", "v_all.output"), "int4:per_token"
    )


def test_one_head_and_its_tokens():
    """Without an axis of heads, one scale for the tensor, and the plan says so; tokens are rows all the same."""
    graph = models.tokens().graph
    assert key_values(graph) == (Kept("k.output", None, True), Kept("v.output", None, True))
    plan = build_plan(graph, "default", activations="int8:per_token", kv_cache="int8:per_head")
    assert plan.spec("k.output").granularity == plan.spec("v.output").granularity == PerTensor()
    assert any(n.startswith("k.output: heads have no axis of their own") for n in plan.notes)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("int8", PerTensor()),
        ("int4", PerTensor()),
        ("int8:per_head", None),
        ("int4:per-token", Dynamic(per_token=True)),
        ("float16", PerTensor()),
    ],
)
@pytest.mark.parametrize("activations", [None, "float", "int8:per_token"])
def test_a_type_of_their_own(text, layout, activations):
    plan = build_plan(attention(), "default", activations=activations, kv_cache=text)
    for site, heads in (("k_moved.output", 1), ("v_split.output", 2)):
        spec = plan.spec(site)
        assert spec.granularity == (layout or PerChannel(heads))
        assert (spec.float_format or f"int{spec.bits}") == text.partition(":")[0]
    plain = build_plan(attention(), "default", activations=activations)
    others = {s for s in plan.activations if s in plain.activations} - {"k_moved.output", "v_split.output"}
    assert all(plan.spec(s) == plain.spec(s) for s in others)
    asked = build_plan(
        attention(), "default", activations=activations, kv_cache=text, overrides={"k_moved.output": "uint16"}
    )
    assert (asked.spec("k_moved.output").bits, asked.spec("k_moved.output").signed) == (16, False)


def test_what_it_can_t_be():
    with pytest.raises(InputError, match="no attention"):
        build_plan(models.mlp().graph, "default", kv_cache="int8")
    for wrong in ("int4:block32", "float16:per_head", "int99", "int8:per_row"):
        with pytest.raises(InputError, match="kv_cache"):
            build_plan(attention(), "default", kv_cache=wrong)
