"""Overrides by pattern and op type: what they mean, which wins, and conflicts."""

import pytest

from bitwright.errors import InputError
from bitwright.grids import QuantSpec
from bitwright.placement import Float, build_plan
from bitwright.testing import models


def plan_of(overrides, model=None):
    return build_plan((model or models.depthwise_triple()).graph, "default", overrides=overrides)


def bits(plan, site):
    decision = plan[plan.root(site)].decision
    return None if isinstance(decision, Float) else decision.bits


def test_an_op_type_means_all_ops_of_the_type():
    plan = plan_of({"Conv": {"weights": "int4"}})
    assert {bits(plan, f"{op}.weight") for op in ("expand", "depthwise", "project")} == {4}
    plan = plan_of({"Conv": "float"})
    assert {bits(plan, f"{op}.weight") for op in ("expand", "depthwise", "project")} == {None}


def test_a_pattern_means_all_ops_that_match_and_a_plain_type_all_tensors():
    plan = plan_of({"*p*": {"weights": "int4"}})  # expand, depthwise, project
    assert {bits(plan, f"{op}.weight") for op in ("expand", "depthwise", "project")} == {4}
    plan = plan_of({"act?.output": "uint16"})
    assert bits(plan, "act1.output") == bits(plan, "act2.output") == 16
    assert bits(plan, "project.output") == 8
    plan = plan_of({"ex*": {"weights": "float16"}})
    assert plan.spec("expand.weight").float_format == "float16"
    assert plan.spec("project.weight") == plan_of({}).spec("project.weight")


@pytest.mark.parametrize("order", [1, -1])
def test_names_win_over_patterns_and_patterns_over_types_in_any_order(order):
    said = {"Conv": {"weights": "int4"}, "d*": {"weights": "int6"}, "project": {"weights": "int7"}}
    plan = plan_of(dict(list(said.items())[::order]))
    assert [bits(plan, f"{op}.weight") for op in ("expand", "depthwise", "project")] == [4, 6, 7]
    said = {"Conv": "float", "project": {"weights": "int4"}}
    plan = plan_of(dict(list(said.items())[::order]))
    assert [bits(plan, f"{op}.weight") for op in ("expand", "depthwise", "project")] == [None, None, 4]


def test_what_is_said_of_a_site_goes_before_its_op():
    assert bits(plan_of({"expand": {"weights": "int4"}, "expand.weight": "int6"}), "expand.weight") == 6
    assert bits(plan_of({"e*": {"weights": "int4"}, "expand.w*": "int6"}), "expand.weight") == 6


def test_patterns_that_contradict_each_other_are_reported_with_both():
    with pytest.raises(InputError, match=r"'exp\*' and '\*pand'.*'expand.weight'"):
        plan_of({"exp*": {"weights": "int4"}, "*pand": {"weights": "int8"}})
    with pytest.raises(InputError, match=r"'exp\*' and '\*pand'.*op 'expand'"):
        plan_of({"exp*": "float", "*pand": {"weights": "int8"}})
    plan = plan_of({"exp*": {"weights": "int4"}, "*pand": {"weights": "int4"}})  # the same twice is none
    assert bits(plan, "expand.weight") == 4


def test_ops_without_the_role_are_passed_over_but_not_all_of_them():
    plan = plan_of({"*": {"weights": "int4"}})
    assert bits(plan, "expand.weight") == 4
    with pytest.raises(InputError, match="none of the ops that 'act\\*' means has weights"):
        plan_of({"act*": {"weights": "int4"}})


@pytest.mark.parametrize(("key", "match"), [("nothing*", "matches 'nothing"), ("Convv", "no op or tensor 'Convv'")])
def test_what_matches_nothing_is_refused(key, match):
    with pytest.raises(InputError, match=match):
        plan_of({key: "float"})


def test_an_exact_name_with_brackets_is_a_name():
    from bitwright.testing.builder import Builder

    b = Builder()
    model = b.build(b.conv("block[0]", b.conv("block0", b.input("x", 3, 8, 8), 4), 4))
    plan = plan_of({"block[0]": {"weights": "int4"}}, model)
    assert (bits(plan, "block[0].weight"), bits(plan, "block0.weight")) == (4, 8)


def test_pinned_types_fit_blocks_only_on_parameters():
    assert isinstance(plan_of({"*.weight": "int4:block4"}).spec("project.weight"), QuantSpec)
    with pytest.raises(InputError, match="blocks are for weights"):
        plan_of({"act*": "int4:block4"})
