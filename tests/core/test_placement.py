"""Placement: the configuration's sections on a ten-op graph, precedence, conflicts, ties, overrides."""

from dataclasses import replace

import numpy as np
import pytest

from bitwright.errors import InputError, TargetError
from bitwright.graph import Graph, Op, OpKind, Param, ParamRole, RecurrentAttrs, Tensor
from bitwright.grids import Blockwise, PerChannel, PerTensor, encoding_from_range
from bitwright.placement import Derived, Float, Fused, SharedWith, build_plan
from bitwright.targets import load_target
from bitwright.testing.builder import Builder
from bitwright.testing.models import concat_branches, residual, transposed

OFF = {
    "defaults": {"ops": {}, "params": {}},
    "params": {},
    "op_type": {},
    "supergroups": [],
    "model_input": {},
    "model_output": {},
}
ON = OFF | {
    "defaults": {"ops": {"is_output_quantized": "True"}, "params": {"is_quantized": "True", "is_symmetric": "True"}}
}


def config(base, **sections):
    return load_target(
        {**base, **{k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}
    )


def example():
    """The graph of the verified table: conv, batch norm, ReLU, max pooling, flatten, linear, softmax."""
    b = Builder()
    x = b.relu("relu", b.batch_norm("bn", b.conv("conv", b.input("x", 3, 8, 8), 4, bias=False)))
    x = b.linear("fc", b.flatten("flatten", b.pool("pool", x, 2, stride=2)), 5)
    return b.build(b.softmax("softmax", x)).graph


def ten_ops():
    b = Builder()
    x = b.pool("pool", b.relu("relu", b.conv("conv1", b.input("x", 3, 8, 8), 4, pad=1)), 2, stride=2)
    y = b.binary("add", "Add", x, b.activation("sig", b.conv("conv2", x, 4, pad=1), "Sigmoid"))
    y = b.flatten("flatten", b.global_pool("gap", y))
    return b.build(b.softmax("softmax", b.linear("fc", y, 5))).graph


def deep_linear():
    """A linear layer on three dimensions, MatMul in ONNX's words, and ReLU."""
    graph = Builder()
    x = graph.linear("fc", graph.input("x", 6, 8), 5)
    made = graph.build(graph.relu("relu", x)).graph
    ops = [replace(op, type="MatMul") if op.id == "fc" else op for op in made.ops]
    return Graph(ops, made.tensors, made.params, made.inputs, made.outputs)


@pytest.mark.parametrize("name", ["Linear", "Dense"])
def test_linear_layers_by_their_frameworks_name(name):
    graph = deep_linear()
    plan = build_plan(graph, config(ON, op_type={name: {"is_output_quantized": "False"}}))
    assert "fc.output" not in plan.quantized and "relu.output" in plan.quantized
    plan = build_plan(graph, config(ON, op_type={name: {"per_channel_quantization": "True"}}))
    assert plan.spec("fc.weight").granularity == PerChannel(0)
    plan = build_plan(graph, config(ON, supergroups=[{"op_list": [name, "ReLU"]}]))
    assert isinstance(plan["fc.output"].decision, Fused)
    plan = build_plan(graph, config(ON, bitwright={"quantized_ops": [name, "Relu"]}))
    assert "fc.output" in plan.quantized
    plan = build_plan(graph, config(ON, op_type={"MatMul": {"is_output_quantized": "False"}}))
    assert "fc.output" not in plan.quantized


def test_a_rule_for_gemm_that_misses_linear_layers_is_told():
    """They are MatMul in ONNX's words; AIMET's PyTorch tools mean both by Gemm."""
    off = {"is_output_quantized": "False"}
    (note,) = build_plan(deep_linear(), config(ON, op_type={"Gemm": off})).notes
    assert note.startswith("op_type Gemm sets is_output_quantized for linear layers on matrices, and not for 'fc'")
    for told in ({"Gemm": off, "MatMul": off}, {"Linear": off}, {"Gemm": off, "Linear": off}, {"Gemm": {}}):
        assert not build_plan(deep_linear(), config(ON, op_type=told)).notes
    assert not build_plan(ten_ops(), config(ON, op_type={"Gemm": off})).notes


OUTPUTS = {f"{n}.output" for n in ("conv1", "relu", "pool", "conv2", "sig", "add", "gap", "flatten", "fc", "softmax")}


def own(plan):
    """Activations with a grid of their own."""
    return set(plan.activations)


def grids(plan):
    """Activations with a grid, shared ones included."""
    return {s for s in plan.quantized if plan[s].role is None}


def test_verified_placement_table():
    g = example()
    on = {
        "default": {"relu", "fc", "softmax"},
        "htp_v66": {"bn", "relu", "fc", "softmax"},
        "htp_v81": {"relu", "fc", "softmax"},
    }
    for name, outputs in on.items():
        plan = build_plan(g, name)
        assert own(plan) == {"x"} | {f"{o}.output" for o in outputs}, name
        per_channel = PerTensor() if name == "htp_v66" else PerChannel(0)
        for weight in ("conv.weight", "fc.weight"):
            spec = plan.spec(weight)
            assert (spec.granularity, spec.symmetric, spec.signed, spec.bits, spec.strict) == (
                per_channel,
                True,
                True,
                8,
                False,
            )
        spec = plan.spec("relu.output")
        assert (spec.symmetric, spec.signed, spec.bits) == (False, False, 8)
        assert all(isinstance(plan[f"bn.{p}"].decision, Float) for p in ("gamma", "beta", "mean", "var"))
        assert plan["pool.output"].decision == SharedWith("relu.output")
        assert plan.root("flatten.output") == "relu.output"
        softmax = encoding_from_range(plan.spec("softmax.output"), 0.0, 0.26)
        assert softmax.maximum == pytest.approx(1.0 if name == "htp_v81" else 0.26, rel=1e-6)
        assert plan["fc.bias"].decision == Derived(("flatten.output", "fc.weight"))


def test_everything_starts_off():
    plan = build_plan(ten_ops(), load_target(OFF))
    assert plan.quantized == ()
    assert all(isinstance(s.decision, Float) and s.decision.reason for s in plan.values())


def test_defaults_switch_outputs_and_parameters():
    plan = build_plan(ten_ops(), load_target(ON))
    assert grids(plan) == OUTPUTS and own(plan) == OUTPUTS - {"pool.output", "flatten.output"}
    assert set(plan.parameters) == {"conv1.weight", "conv2.weight", "fc.weight"}
    assert plan["conv1.bias"].decision == Float("the input 'x' stays in float")
    assert plan["conv2.bias"].decision == Derived(("pool.output", "conv2.weight"))
    assert plan.spec("conv1.weight").granularity == PerTensor()


def test_params_section():
    plan = build_plan(ten_ops(), config(ON, params={"weight": {"is_quantized": "False"}}))
    assert plan.parameters == () and "weight" in plan["fc.weight"].decision.reason
    plan = build_plan(ten_ops(), config(ON, params={"weight": {"is_symmetric": "False"}}))
    assert not plan.spec("fc.weight").symmetric
    plan = build_plan(ten_ops(), config(OFF, params={"weight": {"is_quantized": "True"}}))
    assert len(plan.parameters) == 3


def test_op_type_section():
    plan = build_plan(ten_ops(), config(ON, op_type={"Sigmoid": {"is_output_quantized": "False"}}))
    assert own(plan) == own(build_plan(ten_ops(), load_target(ON))) - {"sig.output"}
    plan = build_plan(ten_ops(), config(OFF, op_type={"Conv": {"is_input_quantized": "True"}}))
    assert own(plan) == {"x", "pool.output"}  # the tensor that the op reads carries the quantizer
    plan = build_plan(
        ten_ops(), config(OFF, op_type={"Softmax": {"is_output_quantized": "True", "is_symmetric": "True"}})
    )
    assert own(plan) == {"softmax.output"} and plan.spec("softmax.output").symmetric
    assert plan.spec("softmax.output").signed
    settings = {"params": {"weight": {"is_quantized": "False"}}}
    plan = build_plan(ten_ops(), config(ON, op_type={"Gemm": settings}))
    assert set(plan.parameters) == {"conv1.weight", "conv2.weight"}
    limits = {"encoding_constraints": {"min": 0.0}}
    spec = build_plan(ten_ops(), config(ON, op_type={"Relu": limits})).spec("relu.output")
    assert (spec.minimum, spec.maximum) == (0.0, None)
    assert float(encoding_from_range(spec, -1.0, 2.0).minimum) == 0.0


def test_grid_preserving_ops_keep_their_inputs_grid_when_switched_off():
    plan = build_plan(ten_ops(), config(ON, op_type={"MaxPool": {"is_output_quantized": "False"}}))
    assert plan["pool.output"].decision == SharedWith("relu.output")


@pytest.mark.parametrize("type", ["AveragePool", "Resize"])
def test_what_averages_stays_in_float_when_switched_off(type):
    """Its input's grid would round it: averages aren't on it, as maxima are."""
    b = Builder()
    x = b.relu("relu", b.conv("conv", b.input("x", 3, 8, 8), 4, pad=1))
    made = b.build(b.conv("last", b.pool("pool", x, 2, stride=2), 4)).graph
    kind = OpKind.AVERAGE_POOL if type == "AveragePool" else OpKind.RESIZE
    ops = [replace(op, type=type, kind=kind, attrs=None) if op.id == "pool" else op for op in made.ops]
    graph = Graph(ops, made.tensors, made.params, made.inputs, made.outputs)
    assert build_plan(graph, config(ON))["pool.output"].decision == SharedWith("relu.output")
    plan = build_plan(graph, config(ON, op_type={type: {"is_output_quantized": "False"}}))
    assert plan["pool.output"].decision == Float(f"the target leaves outputs of {type} in float")
    assert "relu.output" in own(plan)


def test_supergroups_switch_off_what_is_inside():
    plan = build_plan(
        ten_ops(), config(ON, supergroups=[{"op_list": ["Conv", "Relu"]}, {"op_list": ["Conv", "Sigmoid", "Add"]}])
    )
    for inside, group in {"conv1": "Conv+Relu", "conv2": "Conv+Sigmoid+Add", "sig": "Conv+Sigmoid+Add"}.items():
        into = "relu.output" if inside == "conv1" else "add.output"
        assert plan[f"{inside}.output"].decision == Fused(f"inside the supergroup {group}", into)
    assert {"relu.output", "add.output"} <= own(plan)


def test_model_input_and_output_sections():
    base = build_plan(ten_ops(), load_target(ON))
    plan = build_plan(ten_ops(), config(ON, model_input={"is_input_quantized": "True"}))
    assert own(plan) - own(base) == {"x"} and plan["conv1.bias"].decision == Derived(("x", "conv1.weight"))
    plan = build_plan(ten_ops(), config(ON, model_output={"is_output_quantized": "False"}))
    assert own(base) - own(plan) == {"softmax.output"}
    plan = build_plan(ten_ops(), config(OFF, model_output={"is_output_quantized": "True"}))
    assert own(plan) == {"softmax.output"}


def test_later_sections_win():
    off, on = {"is_output_quantized": "False"}, {"is_output_quantized": "True"}
    target = config(
        ON, op_type={"Softmax": off, "Conv": on}, supergroups=[{"op_list": ["Conv", "Relu"]}], model_output=on
    )
    plan = build_plan(ten_ops(), target)
    assert "softmax.output" in own(plan)  # model_output over op_type
    assert "conv1.output" not in own(plan)  # supergroup over op_type
    target = config(ON, op_type={"Conv": {"is_input_quantized": "True"}}, model_input={"is_input_quantized": "False"})
    assert "x" not in own(build_plan(ten_ops(), target))
    target = config(
        ON,
        params={"weight": {"is_quantized": "False"}},
        op_type={"Gemm": {"params": {"weight": {"is_quantized": "True"}}}},
    )
    assert build_plan(ten_ops(), target).parameters == ("fc.weight",)
    defaults = ON["defaults"] | {"per_channel_quantization": "True"}
    plan = build_plan(ten_ops(), config(ON, defaults=defaults, op_type={"Gemm": {"per_channel_quantization": "False"}}))
    assert (plan.spec("fc.weight").granularity, plan.spec("conv1.weight").granularity) == (PerTensor(), PerChannel(0))


def test_contradicting_settings_name_both_ops():
    target = config(ON, op_type={"Sigmoid": {"is_output_quantized": "False"}, "Add": {"is_input_quantized": "True"}})
    with pytest.raises(
        TargetError, match=r"'sig.output'.*Sigmoid.is_output_quantized.*'sig'.*Add.is_input_quantized.*'add'"
    ):
        build_plan(ten_ops(), target)
    target = config(
        ON,
        op_type={"Sigmoid": {"is_symmetric": "True"}, "Add": {"is_input_quantized": "True", "is_symmetric": "False"}},
    )
    with pytest.raises(TargetError, match=r"Sigmoid.is_symmetric is True.*'sig'.*Add.is_symmetric is False"):
        build_plan(ten_ops(), target)


def test_symmetry_flags_reach_specifications():
    defaults = {
        "ops": {"is_output_quantized": "True", "is_symmetric": "True"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
    }
    plan = build_plan(
        ten_ops(), config(ON, defaults=defaults | {"strict_symmetric": "True", "unsigned_symmetric": "True"})
    )
    for site in ("relu.output", "fc.weight"):
        spec = plan.spec(site)
        assert spec.symmetric and spec.strict and spec.unsigned_symmetric and spec.signed


def test_supergroups_are_linear_chains():
    plan = build_plan(residual().graph, "default")
    assert "conv2.output" in own(plan) and "add.output" not in own(plan)  # add+relu fuses, conv2 does not reach it
    b = Builder()
    y = b.conv("conv", b.input("x", 3, 8, 8), 4)
    g = b.build(b.relu("relu", y), b.activation("tanh", y, "Tanh")).graph
    assert "conv.output" in own(build_plan(g, "default"))


def test_hardware_does_not_fuse_volumetric_convolutions():
    b = Builder()
    g = b.build(b.relu("relu", b.conv("conv", b.input("x", 2, 4, 4, 4), 3))).graph
    assert "conv.output" in own(build_plan(g, "htp_v73"))
    assert "conv.output" not in own(build_plan(g, "default"))


def test_per_channel_axes():
    plan = build_plan(transposed().graph, "default")
    axes = {p: plan.spec(f"{p}.weight").granularity for p in ("conv", "up1", "up2")}
    assert axes == {"conv": PerChannel(0), "up1": PerChannel(1), "up2": PerTensor()}  # up2 is grouped
    b = Builder()
    g = b.build(b.prelu("prelu", b.conv("conv", b.input("x", 3, 8, 8), 4), np.full((4, 1, 1), 0.1))).graph
    assert build_plan(g, "default").spec("prelu.slope").granularity == PerChannel(0)
    assert build_plan(g, "per_tensor").spec("prelu.slope").granularity == PerTensor()


def test_blocks_fall_back_where_they_do_not_divide():
    b = Builder()
    x = b.conv("wide", b.conv("stem", b.input("x", 3, 8, 8), 64), 64, 1)
    x = b.conv("up", b.conv("depthwise", x, 64, groups=64), 6, transposed=True)
    g = b.build(x).graph
    plan = build_plan(g, "default", weights="int4:lpbq32")
    assert plan.spec("wide.weight").granularity == Blockwise(0, 1, 32, 8)
    assert plan.spec("up.weight").granularity == Blockwise(1, 0, 32, 8)
    for name in ("stem", "depthwise"):
        assert plan.spec(f"{name}.weight").granularity == PerChannel(0)
        assert any(note.startswith(f"{name}.weight:") and "per channel" in note for note in plan.notes)
    assert len(plan.notes) == 2
    assert plan["wide.bias"].decision == Derived(("stem.output", "wide.weight"))
    plain = build_plan(g, "default", weights="int4:block32")
    assert "blockwise" in plain["wide.bias"].decision.reason


def test_only_matrices_go_below_8_bits():
    b = Builder()
    g = b.build(b.prelu("prelu", b.conv("conv", b.input("x", 3, 8, 8), 4), np.full((4, 1, 1), 0.1))).graph
    plan = build_plan(g, "default", weights="int4", activations="uint16")
    assert (plan.spec("conv.weight").bits, plan.spec("prelu.slope").bits, plan.spec("x").bits) == (4, 8, 16)


def test_float_types():
    plan = build_plan(ten_ops(), "default", weights="fp8", activations="bfloat16")
    assert (plan.spec("x").float_format, plan.spec("fc.weight").float_format) == ("bfloat16", "float8e4m3fn")
    assert isinstance(plan["fc.bias"].decision, Float)
    with pytest.raises(InputError, match="blocks are for weights"):
        build_plan(ten_ops(), "default", activations="int8:block4")
    with pytest.raises(InputError, match="int99"):
        build_plan(ten_ops(), "default", weights="int99")


def test_concat_ties_its_inputs_to_its_output():
    g = concat_branches().graph
    plan = build_plan(g, "default")
    tied = {"concat.output", "act1.output", "pool.output", "right.output"}
    assert set(plan.tied("concat.output")) == tied
    assert plan["act1.output"].decision == SharedWith("concat.output")
    assert set(plan.observed("concat.output")) == {"concat.output", "right.output"}  # pooling hides part of its input
    assert set(build_plan(g, "onnxruntime-cpu").tied("right.output")) == {"right.output", "pool.output"}


def test_a_tensor_tied_twice_has_one_root():
    b = Builder()
    x = b.input("x", 3, 8, 8)
    a, s, c = (b.conv(n, x, 3, pad=1) for n in ("a", "s", "c"))
    left, right = b.concat("left", [a, s]), b.concat("right", [s, c, s])
    g = b.build(b.conv("l", left, 2), b.conv("r", right, 2)).graph
    plan = build_plan(g, "default")
    group = {"a.output", "s.output", "c.output", "left.output", "right.output"}
    (root,) = {plan.root(s) for s in group}
    assert set(plan.tied(root)) == group
    assert set(plan.observed(root)) == {"left.output", "right.output"}
    assert plan.observed("x") == ("x",)


def test_average_pooling_shares_its_inputs_grid_global_pooling_does_not():
    b = Builder()
    x = b.pool("pool", b.conv("conv", b.input("x", 3, 8, 8), 4), 2, type="Average")
    g = b.build(b.global_pool("gap", x)).graph
    plan = build_plan(g, "default")
    assert plan["pool.output"].decision == SharedWith("conv.output")
    assert "gap.output" in own(plan)
    assert "pool.output" in own(build_plan(g, "onnxruntime-cpu"))


def test_opaque_ops_run_in_float():
    b = Builder()
    x = b.opaque("o1", b.conv("conv1", b.input("x", 3, 8, 8), 4, pad=1))
    y = b.opaque("o2", b.conv("conv2", b.reshape("reshape", x, 4, 8, 8), 4))
    g = b.build(y, b.opaque("o3", b.input("z", 3))).graph
    plan = build_plan(g, "default")
    assert "o1.output" in own(plan)  # a quantized convolution reads it, through the reshape
    assert plan["reshape.output"].decision == SharedWith("o1.output")
    assert plan["o2.output"].decision.reason == "opaque op 'o2' (Tanh) runs in float"
    assert plan["z"].decision.reason == "no quantized op reads it"
    assert "conv2.output" in own(plan)


def test_ops_that_the_target_cannot_run_in_integers():
    b = Builder()
    x = b.activation("swish", b.conv("conv1", b.input("x", 3, 8, 8), 4), "HardSwish")
    g = b.build(b.activation("erf", b.conv("conv2", x, 4), "Erf")).graph
    plan = build_plan(g, "onnxruntime-cpu")
    assert {"conv1.output", "swish.output", "conv2.output"} <= own(plan)
    assert plan["erf.output"].decision == Float("the target runs Erf in float")
    assert "erf.output" in own(build_plan(g, "generic-int8"))
    b = Builder()
    x = b.batch_norm("bn", b.conv("conv", b.input("x", 3, 8, 8), 4))
    plan = build_plan(b.build(b.activation("swish", x, "HardSwish")).graph, "onnxruntime-cpu")
    assert "bn.output" in own(plan)  # the convolution's, once folded
    assert plan["bn.mean"].decision == Fused("folds into 'conv'", "conv.weight")


def integers():
    tensors = [
        Tensor("ids", (None, 4), "int64"),
        Tensor("e", (None, 4, 8)),
        Tensor("s", (3,)),
        Tensor("idx", (None, 4), "bool"),
        Tensor("y", (None, 4, 8)),
    ]
    ops = [
        Op("embed", OpKind.EMBEDDING, "Gather", ("ids",), ("e",), {ParamRole.WEIGHT: "table"}),
        Op("shape", OpKind.ACTIVATION, "Shape", ("e",), ("s",)),
        Op("less", OpKind.ELEMENTWISE, "Less", ("e",), ("idx",)),
        Op("fc", OpKind.LINEAR, "MatMul", ("e",), ("y",), {ParamRole.WEIGHT: "w"}),
    ]
    params = {"table": Param("table", (10, 8)), "w": Param("w", (8, 8))}
    return Graph(ops, {t.id: t for t in tensors}, params, ["ids"], ["s", "idx", "y"])


def test_integers_and_embeddings():
    plan = build_plan(integers(), "default", weights="int4")
    assert own(plan) == {"e", "y"}
    assert "int64" in plan["ids"].decision.reason and "Shape" in plan["s"].decision.reason
    table = plan.spec("table")
    assert (table.granularity, table.bits) == (PerTensor(), 8)
    assert plan.spec("w").bits == 4
    assert build_plan(integers(), "htp_v73", activations="uint16").spec("table").bits == 16
    assert build_plan(integers(), "htp_v69", activations="uint16").spec("table").bits == 8
    plan = build_plan(integers(), "htp_v73")  # looking up has no grid of its own there: the rows lie on the table's
    assert plan["e"].decision == SharedWith("table") and own(plan) == {"y"}
    plan = build_plan(integers(), "htp_v73", overrides={"table": "float"})
    assert isinstance(plan["e"].decision, Float)
    with pytest.raises(InputError, match="int64"):
        build_plan(integers(), "default", overrides={"ids": "uint8"})


def attention():
    b = Builder()
    q, k = (b.linear(n, b.input(f"x{n}", 4, 8), 8) for n in "qk")
    return b.build(b.softmax("softmax", b.matmul("scores", q, b.transpose("kt", k, 0, 2, 1)))).graph


def test_dynamic_products_on_hardware():
    old = build_plan(attention(), "htp_v68", activations="uint16")
    spec = old.spec("kt.output")
    assert (spec.bits, spec.symmetric, spec.signed) == (8, True, True) and old.root("kt.output") == "k.output"
    assert old.spec("q.output").bits == 16 and any("scores" in n for n in old.notes)
    new = build_plan(attention(), "htp_v75", activations="uint16")
    assert new.spec("k.output").symmetric and new.spec("k.output").bits == 16
    mixed = build_plan(attention(), "htp_v75", overrides={"k.output": "uint16"})
    assert mixed.spec("q.output").bits == 16 and mixed.spec("xq").bits == 8
    assert not build_plan(attention(), "htp_v75").spec("k.output").symmetric
    assert not build_plan(attention(), "default").spec("k.output").symmetric


def normalization(op_type, kind=OpKind.LAYER_NORM):
    params = {ParamRole.GAMMA: "g", ParamRole.BETA: "b"}
    op = Op("n", kind, op_type, ("x",), ("y",), params)
    tensors = {t: Tensor(t, (None, 8)) for t in "xy"}
    return Graph([op], tensors, {p: Param(p, (8,)) for p in "gb"}, ["x"], ["y"])


def test_normalization_weights_on_hardware():
    layer = normalization("LayerNormalization")
    assert not build_plan(layer, "htp_v73").spec("g").symmetric
    assert build_plan(layer, "htp_v73", weights="int16").spec("g").symmetric
    assert isinstance(build_plan(layer, "htp_v73")["b"].decision, Float)
    group = build_plan(normalization("GroupNormalization", OpKind.NORM), "htp_v73", activations="uint16")
    assert group.spec("g").bits == 16 and group.spec("b") is not None
    assert build_plan(normalization("GroupNormalization", OpKind.NORM), "htp_v69").spec("b") is None
    assert not build_plan(normalization("InstanceNormalization", OpKind.NORM), "htp_v73").spec("g").symmetric


def test_composite_normalization_is_one_op():
    b = Builder()
    x = b.linear("fc", b.input("x", 5, 8), 8)
    m = b.op("mean", OpKind.AVERAGE_POOL, "ReduceMean", (x,), (None, 5, 1))
    d = b.binary("sub", "Sub", x, m)
    v = b.op("var", OpKind.AVERAGE_POOL, "ReduceMean", (b.binary("sq", "Mul", d, d),), (None, 5, 1))
    y = b.binary("div", "Div", d, b.activation("sqrt", b.binary("eps", "Add", v, np.float32(1e-5)), "Sqrt"))
    y = b.binary("beta", "Add", b.binary("gamma", "Mul", y, np.ones(8)), np.zeros(8))
    g = b.build(y).graph
    plan = build_plan(g, "htp_v73")
    assert own(plan) == {"x", "fc.output", "beta.output"}
    assert plan.spec("gamma.constant") is not None and not plan.spec("gamma.constant").symmetric
    for site in ("eps.constant", "beta.constant", "sub.output", "gamma.output"):
        assert plan[site].decision == Fused("inside LayerNormalization", "beta.output")
    for target in ("default", "default_per_channel", "htp_v66", "generic-int8"):
        assert build_plan(g, target)["sub.output"].decision == Fused("inside LayerNormalization", "beta.output")
    # A file that says nothing of passes fuses norms; one that lists them fuses those.
    assert build_plan(g, config(ON))["sub.output"].decision == Fused("inside LayerNormalization", "beta.output")
    assert "sub.output" in own(build_plan(g, config(ON, supergroup_pass_list=[])))
    assert "sub.output" in own(build_plan(g, config(ON, supergroup_pass_list=["RMSNormalization"])))
    ort = build_plan(g, "onnxruntime-cpu")
    assert isinstance(ort["gamma.constant"].decision, Float)


def test_constants_are_quantized_like_activations():
    b = Builder()
    x = b.conv("conv", b.input("x", 3, 8, 8), 4)
    y = b.binary("mul", "Mul", x, np.full((4, 1, 1), 2.0))
    y = b.binary("div", "Div", y, np.full((4, 1, 1), 2.0))
    y = b.op(
        "pow", OpKind.ELEMENTWISE, "Pow", (y,), b.shape(y), params={ParamRole.CONSTANT: b.param("two", np.array(2.0))}
    )
    g = b.build(
        b.binary("add", "Add", b.opaque("o", y), np.ones(1)), b.binary("bias", "Sub", b.opaque("o2", x), np.ones(1))
    ).graph
    plan = build_plan(g, "default")
    assert plan.spec("mul.constant") == plan.spec("x")
    assert "zero" in plan["div.constant"].decision.reason and "exactly" in plan["two"].decision.reason
    target = config(ON, bitwright={"quantize_constants": False}, model_input={"is_input_quantized": "True"})
    assert isinstance(build_plan(g, target)["mul.constant"].decision, Float)


def shared(type_a, type_b, kind_b=OpKind.LINEAR, wires=("x", "y", "z")):
    x, y, z = wires
    ops = [
        Op("a", OpKind.LINEAR, type_a, (x,), (y,), {ParamRole.WEIGHT: "w", ParamRole.BIAS: "b"}),
        Op("b", kind_b, type_b, (y,), (z,), {ParamRole.WEIGHT: "w", ParamRole.BIAS: "b"}),
    ]
    return Graph(
        ops, {t: Tensor(t, (None, 8)) for t in wires}, {"w": Param("w", (8, 8)), "b": Param("b", (8,))}, [x], [z]
    )


def test_shared_parameters():
    plan = build_plan(shared("Gemm", "Gemm"), "default")
    assert plan.spec("w").granularity == PerChannel(0)
    assert "different scales" in plan["b"].decision.reason
    plan = build_plan(shared("Gemm", "MatMul"), config(ON, op_type={"Gemm": {"per_channel_quantization": "True"}}))
    assert plan.spec("w").granularity == PerTensor() and any(n.startswith("w:") for n in plan.notes)
    target = config(ON, op_type={"Gemm": {"params": {"weight": {"is_symmetric": "False"}}}})
    with pytest.raises(TargetError, match=r"'a' \(Gemm\) and 'b' \(MatMul\) share parameter 'w'"):
        build_plan(shared("Gemm", "MatMul"), target)
    plan = build_plan(shared("Gemm", "Custom", OpKind.OPAQUE), "default")
    assert plan.spec("w") is not None  # the opaque use doesn't count


def test_multiple_outputs():
    ops = [
        Op("conv", OpKind.ACTIVATION, "Tanh", ("x",), ("t",)),
        Op("split", OpKind.SPLIT, "Split", ("t",), ("p", "q")),
        Op(
            "lstm",
            OpKind.RECURRENT,
            "LSTM",
            ("q",),
            ("Y", "Y_h", "Y_c"),
            {ParamRole.WEIGHT: "w", ParamRole.RECURRENT: "r", ParamRole.BIAS: "b"},
        ),
    ]
    tensors = {t: Tensor(t, (None, 4)) for t in ("x", "t", "p", "q", "Y", "Y_h", "Y_c")}
    params = {p: Param(p, (1, 16, 4)) for p in "wrb"}
    plan = build_plan(Graph(ops, tensors, params, ["x"], ["p", "Y", "Y_h", "Y_c"]), "default")
    assert set(plan.tied("t")) == {"t", "p", "q"}
    assert plan["Y_h"].decision == SharedWith("Y") and "Y_c" in own(plan)
    assert plan.spec("w").granularity == plan.spec("r").granularity == PerTensor()


@pytest.mark.parametrize(
    ("type", "slots", "tied"),
    [
        ("LSTM", (0, 1, 2), True), ("LSTM", (0, 1), True), ("LSTM", (1, 2), False), ("LSTM", (0, 2), False),
        ("GRU", (0, 1), True), ("LSTM", None, True), ("GRU", None, True),
    ],
)  # fmt: skip
def test_hidden_states_share_a_grid_and_the_cell_state_none(type, slots, tied):
    """Whichever outputs are left out; where an op doesn't tell, only a whole set says which is which."""
    names = [f"o{i}" for i in (slots if slots is not None else range(3 if type == "LSTM" else 2))]
    attrs = None if slots is None else RecurrentAttrs(slots)
    op = Op("rnn", OpKind.RECURRENT, type, ("x",), tuple(names), {ParamRole.WEIGHT: "w"}, attrs)
    tensors = {t: Tensor(t, (None, 4)) for t in ("x", *names)}
    plan = build_plan(Graph([op], tensors, {"w": Param("w", (1, 16, 4))}, ["x"], names), "default")
    assert (plan.tied(names[0]) == ("o0", "o1")) is tied
    assert "o2" not in names or plan.tied("o2") == ("o2",)


def test_two_outputs_of_an_op_that_does_not_tell_which():
    op = Op("rnn", OpKind.RECURRENT, "LSTM", ("x",), ("a", "c"), {ParamRole.WEIGHT: "w"})
    tensors = {t: Tensor(t, (None, 4)) for t in ("x", "a", "c")}
    plan = build_plan(Graph([op], tensors, {"w": Param("w", (1, 16, 4))}, ["x"], ["a", "c"]), "default")
    assert plan.tied("a") == ("a",)


def test_overrides():
    g = ten_ops()
    plan = build_plan(
        g,
        "default",
        overrides={"conv1": "float", "conv2": {"weights": "int4", "activations": "uint16"}, "softmax.output": "float"},
    )
    assert plan["conv1.weight"].decision == Float("op 'conv1' is kept in float by an override")
    assert "relu.output" in own(plan) and "conv1.output" in own(plan)  # a quantized ReLU reads it
    assert (plan.spec("conv2.weight").bits, plan.spec("conv2.output").bits) == (4, 16)
    assert plan["softmax.output"].decision == Float("kept in float by an override")
    assert build_plan(g, "default", overrides={"softmax": "float"})["softmax.output"].decision.reason.startswith(
        "op 'softmax'"
    )
    plan = build_plan(g, "default", overrides={"pool.output": "uint16", "fc": {"bias": "float"}, "fc.weight": "int6"})
    assert plan.spec("pool.output").bits == 16 and plan.spec("relu.output").bits == 8
    assert isinstance(plan["fc.bias"].decision, Float) and plan.spec("fc.weight").bits == 6
    plan = build_plan(concat_branches().graph, "default", overrides={"act1.output": "uint16"})
    assert plan.root("act1.output") == "act1.output"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"conv9": "float"}, r"no op or tensor 'conv9'; did you mean 'conv"),
        ({"conv1": "int4"}, r"'conv1' can't be 'int4'"),
        ({"conv1": {"weight": "int4"}}, r"allowed keys: weights, activations, bias"),
        ({"conv1": {"weights": "int77"}}, r"'conv1': weights: .*int77"),
        ({"relu": {"weights": "int4"}}, r"'relu' \(Relu\) has no weights"),
        ({"x": "int8:block4"}, r"blocks are for weights"),
        ({"x": 8}, r"'x' can't be 8"),
    ],
)
def test_bad_overrides(overrides, reason):
    with pytest.raises(InputError, match=reason):
        build_plan(ten_ops(), "default", overrides=overrides)


def test_supported_kernels_are_checked():
    kernels = [{"activation": {"bitwidth": 8, "dtype": "int"}, "param": {"bitwidth": 8, "dtype": "int"}}]
    target = config(ON, op_type={"Gemm": {"supported_kernels": kernels}}, model_input={"is_input_quantized": "True"})
    assert build_plan(ten_ops(), target).notes == ()
    (note,) = build_plan(ten_ops(), target, weights="int4").notes
    assert note == "fc: the target has no Gemm kernel for int8 × int4, only int8 × int8"


def test_schemes():
    plan = build_plan(ten_ops(), "default", scheme="mse", weight_scheme="sqnr")
    assert (plan.scheme_of("x"), plan.weight_scheme_of("fc.weight"), plan.target) == ("mse", "sqnr", "default")


def test_table():
    rows = {r.site: r for r in build_plan(example(), "htp_v81", weights="int4:lpbq4").table()}
    assert list(rows) == list(build_plan(example(), "htp_v81"))
    assert (rows["x"].bits, rows["x"].granularity, rows["x"].reason) == ("uint8", "per tensor", "asymmetric")
    assert rows["fc.weight"].granularity == "blocks of 4, 8-bit LPBQ"
    assert rows["softmax.output"].reason == "asymmetric, min 0, max 1"
    assert (rows["pool.output"].bits, rows["pool.output"].decision, rows["pool.output"].reason) == (
        "uint8",
        "shared",
        "the grid of relu.output",
    )
    assert (rows["fc.bias"].bits, rows["fc.bias"].reason) == ("int32", "bias of flatten.output and fc.weight")
    assert rows["bn.gamma"].decision == "fused" and rows["bn.gamma"].reason == "folds into 'conv'"


def test_pairs_are_limited_where_kernels_add_them_in_int16():
    b = Builder()
    x = b.relu("r1", b.conv("conv", b.input("x", 4, 8, 8), 6))
    x = b.relu("r2", b.conv("depthwise", x, 6, groups=6))
    x = b.conv("grouped", x, 6, groups=2)
    graph = b.build(b.linear("fc", b.flatten("flatten", b.global_pool("pool", x)), 5)).graph

    def limits(target, **options):
        plan = build_plan(graph, target, **options)
        return {p: s.pair_limit for p in plan.parameters if (s := plan.spec(p)).pair_limit is not None}

    # The first convolution keeps its scales.
    every = {"grouped.weight": 128, "fc.weight": 128}
    assert limits("onnxruntime-cpu") == every
    assert limits("onnxruntime-cpu", activations="int8") == every  # the runtime moves them to uint8
    assert limits("onnxruntime-cpu", overrides={"fc": "float"}) == {k: 128 for k in every if k != "fc.weight"}
    for options in ({"weights": "int4"}, {"weights": "uint8"}, {"activations": "uint16"}):
        assert limits("onnxruntime-cpu", **options) == {}
    # Three inputs a group make no blocks of two.
    assert limits("onnxruntime-cpu", weights="int8:block2") == {"grouped.weight": 128}
    assert limits("generic-int8") == {}
    off = {"per_channel_quantization": "False"}
    per_tensor = {
        "bitwright": {"extends": "onnxruntime-cpu"},
        "op_type": dict.fromkeys(("Conv", "Gemm", "MatMul"), off),
    }
    assert limits(load_target(per_tensor)) == {}


def tied(head="Gemm", kind=OpKind.LINEAR):
    ops = [
        Op("emb", OpKind.EMBEDDING, "Gather", ("ids",), ("e",), {ParamRole.WEIGHT: "w"}),
        Op("head", kind, head, ("e",), ("y",), {ParamRole.WEIGHT: "w"}),
    ]
    tensors = {"ids": Tensor("ids", (None, 4), "int64"), **{t: Tensor(t, (None, 4, 8)) for t in "ey"}}
    return Graph(ops, tensors, {"w": Param("w", (40, 8))}, ["ids"], ["y"])


@pytest.mark.parametrize("weights", [None, "int4", "int4:block4", "int6"])
def test_a_tied_head_and_embedding_take_the_best_that_both_can(weights):
    """Tables don't go below 8 bits; the head's scale for each output channel goes with the table's rows."""
    plan = build_plan(tied(), "default", weights=weights)
    spec = plan.spec("w")
    assert (spec.bits, spec.granularity) == (8, PerChannel(0))
    (note,) = plan.notes
    assert note.startswith("w: 'emb' (Gather) and 'head' (Gemm) share it, int8 symmetric per tensor and ")
    assert note.endswith("int8 symmetric per channel for both")
    assert weights is None or f"and int{weights[3]}" in note
    # Where lookups take their table's grid, or the head has one scale, there is one scale.
    assert build_plan(tied(), "htp_v73", weights=weights).spec("w").granularity == PerTensor()
    assert build_plan(tied(), "per_tensor", weights=weights).spec("w").granularity == PerTensor()


@pytest.mark.parametrize(("type", "format"), [("mxfp4", None), ("nf4:block2", None), ("mxfp8", "float8e4m3fn")])
def test_a_tied_table_has_no_blocks_of_floats(type, format):
    """It has a scale for each row, which is any float32; the 4-bit types leave it to integers."""
    ops = [
        Op("layer", OpKind.LINEAR, "Gemm", ("x",), ("y",), {ParamRole.WEIGHT: "w"}),
        Op("emb", OpKind.EMBEDDING, "Gather", ("ids",), ("e",), {ParamRole.WEIGHT: "w"}),
    ]
    tensors = {"ids": Tensor("ids", (None, 4), "int64"), **{t: Tensor(t, (None, 4, 32)) for t in "xye"}}
    graph = Graph(ops, tensors, {"w": Param("w", (40, 32))}, ["ids", "x"], ["y", "e"])
    spec = build_plan(graph, "default", weights=type).spec("w")
    assert (spec.bits, spec.float_format, spec.granularity, spec.scale_type) == (8, format, PerChannel(0), None)


@pytest.mark.parametrize("type", ["float16", "fp8"])
def test_a_table_that_a_linear_op_shares_may_be_float(type):
    from bitwright.testing import models

    plan = build_plan(models.tokens().graph, "default", weights=type)
    spec = plan.spec("table")
    assert spec.float_format == {"float16": "float16", "fp8": "float8e4m3fn"}[type]
    assert spec.granularity == PerChannel(0)
