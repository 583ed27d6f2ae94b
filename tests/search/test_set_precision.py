"""Mixed precision by hand."""

from __future__ import annotations

import pytest
from search_net import build

from bitwright import QuantSim
from bitwright.errors import InputError
from bitwright.graph import OpKind
from bitwright.placement import Float


def kinds(sim, *sites):
    rows = {r.site: r.bits for r in sim.plan.table()}
    return [rows[s] for s in sites]


@pytest.fixture
def sim():
    return QuantSim(build())


def test_by_op_module_type_pattern_kind_and_tensor(sim):
    assert sim.set_precision("dw", weights="int4") == ()
    assert kinds(sim, "dw.weight", "mix.weight") == ["int4", "int8"]
    sim.set_precision("Conv", weights="int5")
    assert kinds(sim, "stem.weight", "dw.weight", "fc.weight") == ["int5", "int5", "int8"]
    sim.set_precision("?i*", weights="int6")
    assert kinds(sim, "mix.weight", "dw.weight") == ["int6", "int5"]
    sim.set_precision(OpKind.LINEAR, weights="int7")
    sim.set_precision("image", activations="uint16")
    sim.set_precision(["res.weight", "stem"], weights="int3")
    assert kinds(sim, "fc.weight", "image", "res.weight", "stem.weight") == ["int7", "uint16", "int3", "int3"]


def test_outputs_of_a_fused_op_are_those_of_the_group(sim):
    sim.set_precision("stem", activations="uint16")
    assert isinstance(sim.plan["stem_out"].decision, Float)
    assert kinds(sim, "relu1_out", "relu2_out") == ["uint16", "uint8"]
    sim.set_precision("mix", inputs="uint12")
    assert kinds(sim, "relu2_out") == ["uint12"]


def test_what_shares_a_grid_goes_along_and_is_named(sim):
    (remark,) = sim.set_precision("flat", activations="uint16")
    assert not remark.serious
    assert "pool_out" in str(remark)
    assert kinds(sim, "pool_out", "flat_out") == ["uint16", "uint16"]
    with pytest.raises(InputError, match=r"'pool_out'.*asked to be uint16"):
        QuantSim.set_precision(sim, "flat_out", activations="uint8")
    assert kinds(sim, "flat_out") == ["uint16"]
    found = sim.set_precision("flat_out", activations="uint8", strict=False)
    assert any(c.serious for c in found)
    assert kinds(sim, "pool_out", "flat_out") == ["uint8", "uint8"]


def test_a_later_call_wins_and_says_so(sim):
    sim.set_precision("mix", weights="int4")
    (remark,) = sim.set_precision("mix", weights="int16")
    assert "takes the place of int4" in str(remark)
    assert kinds(sim, "mix.weight") == ["int16"]


def test_float_and_back(sim):
    sim.set_precision("mix", weights="float", activations="float")
    assert kinds(sim, "mix.weight", "mix_out") == ["float", "float"]
    sim.set_precision("mix", weights="int8", activations="uint8")
    assert kinds(sim, "mix.weight", "mix_out") == ["int8", "uint8"]


def test_kernels_that_the_target_lacks():
    kernel = {"activation": {"bitwidth": 8, "dtype": "int"}, "param": {"bitwidth": 8, "dtype": "int"}}
    target = {
        "defaults": {"ops": {"is_output_quantized": "True"}, "params": {"is_quantized": "True"},
                     "supported_kernels": [kernel]},
        "params": {}, "op_type": {}, "supergroups": [], "model_input": {"is_input_quantized": "True"},
        "model_output": {},
    }  # fmt: skip
    sim = QuantSim(build(), target=target)
    with pytest.raises(InputError, match="'mix': the target has no Conv kernel for int8 × int4"):
        sim.set_precision("mix", weights="int4")
    assert kinds(sim, "mix.weight") == ["int8"]
    assert sim.set_precision("mix", weights="int4", strict=False)
    assert kinds(sim, "mix.weight") == ["int4"]


def test_frozen_encodings_of_another_type(sim, net):
    sim.apply("adaround", net.images[:16])
    assert sim.encodings["mix.weight"].frozen
    with pytest.raises(InputError, match=r"'mix\.weight': its frozen encoding has another type"):
        sim.set_precision("mix", weights="int4")
    sim.set_precision("mix", weights="int4", strict=False)
    assert "mix.weight" not in sim.encodings
    assert sim.encodings["res.weight"].frozen
    sim.calibrate(net.images[:16])
    assert sim.encodings["mix.weight"].bits == 4


def test_weights_only_takes_exceptions():
    sim = QuantSim(build(), activations="float")
    sim.set_precision("image", activations="uint8")
    assert kinds(sim, "image", "relu1_out", "mix.weight") == ["uint8", "float", "int8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", {"weights": "int4"}), "no op, module, type or tensor 'nothing'"),
        (("mix", {}), "give weights=, activations= or inputs="),
        (("mix", {"weights": "int99"}), "integer types have 2 to 16 bits"),
        (("mix", {"activations": "int4:block32"}), "blocks are for weights"),
        (("relu1", {"weights": "int4"}), "'relu1' has no weights"),
        (("mix.weight", {"activations": "uint8"}), "is not an op; pass weights="),
        (("image", {"weights": "int8"}), "is not an op; pass activations="),
        (("stem_out", {"activations": "uint8"}), "it is fused"),
    ],
)
def test_bad_requests_change_nothing(sim, arguments, message):
    name, types = arguments
    before = sim.plan.table()
    with pytest.raises(InputError, match=message):
        sim.set_precision(name, **types)
    assert sim.plan.table() == before
    assert sim.overrides == {}


def test_ties_hold_where_all_tensors_get_the_same_type():
    from bitwright.placement import build_plan
    from bitwright.testing import models

    graph = models.concat_branches().graph
    plain = build_plan(graph, "default")
    group = next(plan for s in plain if len(plan := plain.tied(s)) > 2)
    wide = build_plan(graph, "default", overrides=dict.fromkeys(group, "uint16"))
    assert {wide.root(s) for s in group} == {wide.root(group[0])}
    assert wide.spec(group[-1]).bits == 16
    mixed = build_plan(graph, "default", overrides={**dict.fromkeys(group, "uint16"), group[-1]: "uint8"})
    assert mixed.spec(group[-1]).bits == 8
