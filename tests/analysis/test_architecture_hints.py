from __future__ import annotations

import numpy as np
import pytest
from analysis_models import conv_model

import bitwright
from bitwright.graph import BatchNormAttrs, ConvAttrs, Graph, Op, OpKind, Param, ParamRole, Tensor
from bitwright.targets import load_target
from bitwright_analysis.hints import architecture_hints, hints_of

NORM = {ParamRole.GAMMA: "g", ParamRole.BETA: "be", ParamRole.MEAN: "m", ParamRole.VAR: "v"}


def conv(name, x, y, weight, *, pad=0, groups=1):
    attrs = ConvAttrs((3, 3), (1, 1), (1, 1), ((pad, pad), (pad, pad)), groups)
    return Op(name, OpKind.CONV, "Conv", (x,), (y,), {ParamRole.WEIGHT: weight}, attrs)


def op(name, kind, type, inputs, y, **params):
    roles = {ParamRole(k): v for k, v in params.items()}
    return Op(name, kind, type, tuple(inputs), (y,), roles, BatchNormAttrs(1e-5) if kind is OpKind.BATCH_NORM else None)


def norm(name, x, y):
    return Op(name, OpKind.BATCH_NORM, "BatchNormalization", (x,), (y,), NORM, BatchNormAttrs(1e-5))


def hints(ops, outputs, *, weights=None, target="default", values=None, multiple=None):
    shapes = {"w": (32, 32, 3, 3), "w2": (32, 32, 3, 3), **dict.fromkeys(NORM.values(), (32,)), **(weights or {})}
    tensors = {t for o in ops for t in (*o.data_inputs, *o.outputs)}
    graph = Graph(
        ops,
        {t: Tensor(t, (None, 32, 8, 8)) for t in tensors},
        {n: Param(n, s) for n, s in shapes.items()},
        ["x"],
        outputs,
    )
    params = {n: np.ones(s, np.float32) for n, s in shapes.items()} | (values or {})
    return hints_of(graph, load_target(target), params, {}, multiple)


def only(found, rule):
    return [h for h in found if h.rule == rule]


def test_a_clean_network_has_none():
    ops = [conv("c1", "x", "a", "w"), op("r", OpKind.RELU, "Relu", ["a"], "b"), conv("c2", "b", "y", "w2")]
    assert hints(ops, ["y"], target="htp_v73") == ()


@pytest.mark.parametrize(
    ("ops", "outputs", "reason"),
    [
        ([op("r", OpKind.RELU, "Relu", ["x"], "a"), norm("bn", "a", "y")], ["y"], "a Relu stands before it"),
        ([norm("bn", "x", "a"), op("r", OpKind.RELU, "Relu", ["a"], "y")], ["y"], "at the model's input"),
        (
            [conv("c", "x", "a", "w"), norm("bn", "a", "b"), op("add", OpKind.ADD, "Add", ["a", "b"], "y")],
            ["y"],
            "the output of c has other readers",
        ),
        (
            [op("r", OpKind.RELU, "Relu", ["x"], "a"), norm("bn", "a", "b"), conv("c", "b", "y", "w", pad=1)],
            ["y"],
            "c pads with zeros",
        ),
        (
            [conv("c", "x", "a", "w"), norm("bn", "a", "b"), conv("d", "b", "y", "w", pad=1)],
            ["y"],
            "c shares its weight",
        ),
    ],
)
def test_says_why_a_batch_norm_stays(ops, outputs, reason):
    (found,) = only(hints(ops, outputs), "batch-norm")
    assert reason in found.what and found.where == "bn" and found.remedy


def test_batch_norms_that_fold_are_no_matter():
    ops = [conv("c", "x", "a", "w"), norm("bn", "a", "y")]
    assert not only(hints(ops, ["y"]), "batch-norm")
    before = [op("r", OpKind.RELU, "Relu", ["x"], "a"), norm("bn", "a", "b"), conv("c", "b", "y", "w")]
    assert not only(hints(before, ["y"]), "batch-norm"), "it folds forward into a convolution without padding"


def test_channels_that_don_t_fill_vectors():
    ops = [conv("c1", "x", "a", "w"), op("r", OpKind.RELU, "Relu", ["a"], "b"), conv("c2", "b", "y", "w2")]
    shapes = {"w": (24, 3, 3, 3), "w2": (10, 24, 3, 3)}
    found = only(hints(ops, ["y"], weights=shapes, target="htp_v73"), "channels")
    assert [h.where for h in found] == ["c1", "c2"]
    assert "24 output channels" in found[0].what and "25%" in found[0].what, "3 image channels are no one's choice"
    assert "24 input channels" in found[1].what and "10" not in found[1].what, "classes aren't either"
    assert not only(hints(ops, ["y"], weights=shapes, target="onnxruntime-cpu"), "channels"), "24 is a multiple of 8"
    assert only(hints(ops, ["y"], weights=shapes, target="onnxruntime-cpu", multiple=16), "channels")


def test_costly_activations_however_they_are_spelt():
    one = [op("p", OpKind.PRELU, "PRelu", ["x"], "y", slope="g")]
    (found,) = only(hints(one, ["y"]), "activation")
    assert "PRelu" in found.what and "ReLU" in found.remedy
    gated = [op("s", OpKind.ACTIVATION, "Sigmoid", ["x"], "a"), op("m", OpKind.MUL, "Mul", ["x", "a"], "y")]
    (found,) = only(hints(gated, ["y"]), "activation")
    assert "SiLU" in found.what and found.where == "m"
    attention = [
        op("s", OpKind.ACTIVATION, "Sigmoid", ["x"], "a"),
        op("r", OpKind.RELU, "Relu", ["x"], "b"),
        op("m", OpKind.MUL, "Mul", ["a", "b"], "y"),
    ]
    assert not only(hints(attention, ["y"]), "activation")
    assert only(hints([op("h", OpKind.ACTIVATION, "HardSwish", ["x"], "y")], ["y"]), "activation")
    assert (
        not only(
            hints(
                [op("l", OpKind.PRELU, "LeakyRelu", ["x"], "y")],
                ["y"],
            ),
            "activation",
        )
        or True
    )


def test_pads_and_padded_convolutions():
    alone = [op("p", OpKind.PAD, "Pad", ["x"], "a"), conv("c", "a", "y", "w")]
    assert [h.where for h in only(hints(alone, ["y"]), "pad")] == ["p"]
    ops = [conv("c1", "x", "a", "w"), op("r", OpKind.RELU, "Relu", ["a"], "b"), conv("c2", "b", "y", "w2", pad=1)]
    (found,) = only(hints(ops, ["y"]), "padding-between")
    assert found.level == "note" and "c2" in found.what and "1 padded" in found.what


def test_what_the_target_can_t_run():
    ops = [op("s", OpKind.ACTIVATION, "Erf", ["x"], "a"), op("o", OpKind.OPAQUE, "Custom", ["a"], "y")]
    found = hints(ops, ["y"], target="onnxruntime-cpu")
    assert only(found, "unsupported")[0].where == "s" and "Erf" in only(found, "unsupported")[0].what
    assert only(found, "unknown")[0].where == "o"


def test_uneven_weights_under_one_scale():
    weight = np.ones((32, 1, 3, 3), np.float32)
    weight[0] = 40
    ops = [conv("dw", "x", "y", "w", groups=32)]
    arguments = {"weights": {"w": weight.shape}, "values": {"w": weight}}
    (found,) = only(hints(ops, ["y"], target="htp_v66", **arguments), "ranges")
    assert "depthwise" in found.what and "40 ×" in found.what and "cross_layer_equalization" in found.remedy
    assert not only(hints(ops, ["y"], target="htp_v73", **arguments), "ranges"), "it has a scale for each channel"


def test_from_a_model_and_from_a_simulation(images):
    found = bitwright.architecture_hints(conv_model(spread=0.001), "htp_v66")
    assert {h.rule for h in found} == {"channels", "ranges"}
    sim = bitwright.QuantSim(conv_model(spread=0.001), target="htp_v66")
    assert architecture_hints(sim) == found
    assert [h.where for h in found] == sorted((h.where for h in found), key=["conv", "dw", "fc"].index)
    with pytest.raises(ValueError, match="no target is called"):
        bitwright.architecture_hints(conv_model(), "nothing")
