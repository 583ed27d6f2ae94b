"""Sums of exponentials below a quotient or a logarithm, on graphs in canonical form."""

from __future__ import annotations

import pytest

from bitwright.graph import COMPOSITES, OpKind, softmaxes
from bitwright.placement import build_plan
from bitwright.testing.builder import Builder


def total(b, x, name="sum"):
    return b.op(name, OpKind.ELEMENTWISE, "ReduceSum", (x,), (*b.shape(x)[:-1], 1))


def shifted(b, x):
    top = b.op("max", OpKind.MAX_POOL, "ReduceMax", (x,), (*b.shape(x)[:-1], 1))
    return b.binary("sub", "Sub", x, top)


def softmax(b, x, *, stable=True):
    e = b.activation("exp", shifted(b, x) if stable else x, "Exp")
    return b.binary("div", "Div", e, total(b, e))


def log_sum(b, x):
    return b.activation("log", total(b, b.activation("exp", shifted(b, x), "Exp")), "Log")


def found(b, *outputs):
    graph = b.build(*outputs).graph
    return graph, {c.output.id: c for c in COMPOSITES["Exponentials"](graph)}


@pytest.mark.parametrize("stable", [True, False])
def test_a_softmax_begins_before_the_maximum(stable):
    b = Builder(0)
    x = b.relu("r", b.input("x", 4, 6))
    graph, composites = found(b, b.relu("end", softmax(b, x, stable=stable)))
    (composite,) = composites.values()
    assert (composite.type, composite.source, composite.output.id) == ("Softmax", "r.output", "div")
    assert {op.id for op in composite.ops} == {op.id for op in graph} - {"r", "end"}
    (reading,) = softmaxes(graph)
    assert (reading.scores, reading.result) == ("r.output", "div.output")


def test_the_largest_that_nothing_outside_reads():
    b = Builder(0)
    x = b.input("x", 4, 6)
    lse = b.binary("again", "Add", log_sum(b, x), "max.output")
    end = b.activation("p", b.binary("l", "Sub", x, lse), "Exp")
    graph, composites = found(b, b.relu("end", end))
    assert (composites["p"].type, composites["p"].source) == ("Softmax", "x")
    assert {op.id for op in composites["p"].ops} == {op.id for op in graph} - {"end"}

    b = Builder(0)
    x = b.input("x", 4, 6)
    lse = b.binary("again", "Add", log_sum(b, x), "max.output")
    _, composites = found(b, b.binary("l", "Sub", x, lse), "max.output")
    (composite,) = composites.values()  # the maximum is a model output: from the exponential to its logarithm
    assert (composite.type, composite.source, composite.output.id) == ("ReduceLogSumExp", "sub.output", "log")


def test_what_others_read_is_a_softmax_still_but_not_one_op():
    b = Builder(0)
    graph, composites = found(b, softmax(b, b.input("x", 4, 6)), "sum.output")
    assert composites == {} and [s.result for s in softmaxes(graph)] == ["div.output"]


def test_a_quotient_of_no_exponentials_is_none():
    b = Builder(0)
    x = b.relu("r", b.input("x", 4, 6))
    mean = b.binary("div", "Div", x, total(b, x))
    alone = b.binary("alone", "Div", x, b.activation("exp", x, "Exp"))
    mixed = b.binary("mixed", "Add", b.activation("other", x, "Exp"), x)
    graph, composites = found(b, mean, alone, b.activation("log", mixed, "Log"))
    assert composites == {} and list(softmaxes(graph)) == []


def test_the_scores_of_one_are_calibrated_as_those_of_an_op():
    b = Builder(0)
    x = b.linear("scores", b.input("x", 4, 6), 6)
    plan = build_plan(b.build(b.linear("end", softmax(b, x), 6)).graph, "default")
    assert (plan.scheme_of("scores.output"), plan.scheme_of("div.output")) == ("scores", "mse")


def test_long_chains_take_no_deep_recursion():
    b = Builder(0)
    x = b.activation("exp", b.input("x", 4), "Exp")
    for i in range(3000):
        x = b.binary(f"a{i}", "Add", x, x)
    _, composites = found(b, b.activation("log", x, "Log"))
    assert len(composites["log"].ops) == 3002
