"""Graph edits: functional, and equal in what they compute."""

import builders as b
import numpy as np
import onnx_ir as ir
import pytest

from bitwright.errors import ModelError
from bitwright.graph import (
    FoldBatchNorm,
    OpKind,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
)
from bitwright_onnx.backend import OnnxBackend
from bitwright_onnx.simulate.session import compile_session

BACKEND = OnnxBackend()


def outputs(model, x):
    return compile_session(model).run(None, {"x": x})[0]


def edited(model: ir.Model, *edits) -> ir.Model:
    """Apply, and check that the model given is as it was and that the result can be captured and saved."""
    before = ir.to_proto(model).SerializeToString()
    result = BACKEND.edit(model, edits)
    assert result is not model and ir.to_proto(model).SerializeToString() == before
    BACKEND.graph(result)
    return result


def folding(model, norm: str, into: str):
    """Values of a backward fold, in float64: W·γ/σ and (b − μ)·γ/σ + β."""
    g = BACKEND.graph(model)
    p = {
        k: v.astype(np.float64)
        for k, v in BACKEND.read(model, [*g.op(norm).params.values(), *g.op(into).params.values()]).items()
    }
    gamma, beta, mean, var = (
        p[g.op(norm).params[r]] for r in (ParamRole.GAMMA, ParamRole.BETA, ParamRole.MEAN, ParamRole.VAR)
    )
    scale = gamma / np.sqrt(var + g.op(norm).attrs.epsilon)
    weight = p[g.op(into).weight]
    bias = p.get(g.op(into).params.get(ParamRole.BIAS, ""), 0.0)
    return weight, scale, (bias - mean) * scale + beta


def test_backward_fold_of_both_batch_norms():
    model = BACKEND.adopt(b.small_cnn())
    x = b.image(2, 3, 8, 8)
    edits = []
    for norm, into in (("bn1", "conv1"), ("bn2", "dw")):
        weight, scale, bias = folding(model, norm, into)
        id = BACKEND.graph(model).op(into).weight
        edits += [FoldBatchNorm(norm, into), SetParams({id: weight * scale[:, None, None, None]}), SetBias(into, bias)]
    result = edited(model, *edits)
    np.testing.assert_allclose(outputs(result, x), outputs(model, x), rtol=1e-5, atol=1e-6)
    g = BACKEND.graph(result)
    assert g.op("conv1").outputs == ("b1",) and g.op("dw").outputs == ("b2",) and "bn1" not in g
    assert g.op("dw").params[ParamRole.BIAS] == "dw.bias" and "bn1.gamma" not in result.graph.initializers
    # What no edit touched is shared, not copied.
    assert result.graph.initializers["fc.weight"].const_value is model.graph.initializers["fc.weight"].const_value


def test_backward_fold_into_a_matmul_with_and_without_bias():
    for bias in (True, False):
        m = b.ModelBuilder()
        m.input("x", ["N", 6])
        m.node("MatMul", ["x", m.weight("w", 6, 4)], "h", "fc")
        source = m.node("Add", ["h", m.weight("c", 4)], "a", "add") if bias else "h"
        m.batch_norm(source, "y", 4, "bn")
        m.output("y")
        model = BACKEND.adopt(m.build())
        weight, scale, value = folding(model, "bn", "fc")
        result = edited(
            model, SetParams({"w": weight * scale[:, None]}), SetBias("fc", value), FoldBatchNorm("bn", "fc")
        )
        x = b.image(3, 6)
        np.testing.assert_allclose(outputs(result, x), outputs(model, x), rtol=1e-5, atol=1e-6)
        (op,) = BACKEND.graph(result)
        assert (op.id, op.outputs, op.kind) == ("fc", ("y",), OpKind.LINEAR)


def test_forward_fold():
    m = b.ModelBuilder()
    m.input("x", ["N", 3, 6, 6])
    m.batch_norm("x", "n", 3, "bn")
    m.node("Conv", ["n", m.weight("w", 4, 3, 3, 3), m.weight("b", 4)], "y", "conv")
    m.output("y")
    model = BACKEND.adopt(m.build())
    g = BACKEND.graph(model)
    p = BACKEND.read(model, g.params)
    scale = p["bn.gamma"] / np.sqrt(p["bn.var"] + 1e-5)
    shift = p["bn.beta"] - p["bn.mean"] * scale
    bias = p["b"] + (p["w"] * shift[None, :, None, None]).sum(axis=(1, 2, 3))
    result = edited(
        model, FoldBatchNorm("bn", "conv"), SetParams({"w": p["w"] * scale[None, :, None, None]}), SetBias("conv", bias)
    )
    x = b.image(2, 3, 6, 6)
    np.testing.assert_allclose(outputs(result, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    assert BACKEND.graph(result).op("conv").inputs == ("x",)


def test_folds_that_would_change_other_readers_are_refused():
    m = b.ModelBuilder()
    m.input("x", ["N", 3, 6, 6])
    m.node("Conv", ["x", m.weight("w", 4, 3, 1, 1)], "c", "conv")
    m.batch_norm("c", "n", 4, "bn")
    m.node("Relu", ["c"], "r")
    m.node("Add", ["n", "r"], "y", "add")
    m.output("y")
    model = BACKEND.adopt(m.build())
    with pytest.raises(ModelError, match="'c' is also read elsewhere"):
        BACKEND.edit(model, [FoldBatchNorm("bn", "conv")])
    cnn = BACKEND.adopt(b.small_cnn())
    with pytest.raises(ModelError, match="not neighbours"):
        BACKEND.edit(cnn, [FoldBatchNorm("bn1", "dw")])
    with pytest.raises(ModelError, match="can't be folded"):
        BACKEND.edit(cnn, [FoldBatchNorm("relu2", "dw")])
    with pytest.raises(ModelError, match="no op 'gone'"):
        BACKEND.edit(cnn, [FoldBatchNorm("gone", "dw")])


def biasless(op: str) -> tuple[ir.Model, tuple[int, ...]]:
    m = b.ModelBuilder()
    shape = {"Conv": (2, 4, 5, 5), "ConvTranspose": (2, 4, 5, 5), "Gemm": (2, 6), "MatMul": (2, 3, 6)}[op]
    m.input("x", ["N", *shape[1:]])
    weights = {"Conv": (6, 2, 3, 3), "ConvTranspose": (4, 3, 3, 3), "Gemm": (6, 6), "MatMul": (6, 6)}
    attrs = {"group": 2} if "Conv" in op else {"transB": 1} if op == "Gemm" else {}
    m.node(op, ["x", m.weight("layer.weight", *weights[op])], "h", "op", **attrs)
    m.node("Relu", ["h"], "y")
    m.output("y")
    m.output("h")
    return BACKEND.adopt(m.build()), shape


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_set_bias_creates_then_replaces(op):
    model, shape = biasless(op)
    x = b.image(*shape)
    plain = compile_session(model).run(["h"], {"x": x})[0]
    for value in (np.arange(6.0), np.ones(6)):
        model = edited(model, SetBias("op", value))
        g = BACKEND.graph(model)
        assert g.op("op").params[ParamRole.BIAS] == "layer.bias" and g.op("op").outputs == ("h",) and len(g) == 2
        wide = value.reshape(6, *(1,) * (plain.ndim - 2)) if "Conv" in op else value
        # The tensor keeps its name, as a model output too, and holds the sum.
        np.testing.assert_allclose(compile_session(model).run(["h"], {"x": x})[0], plain + wide, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(BACKEND.read(model, ["layer.bias"])["layer.bias"], value)


def test_a_shared_bias_is_not_changed_for_others():
    m = b.ModelBuilder()
    m.input("x", ["N", 4])
    m.weight("c", 4)
    for i, source in ((1, "x"), (2, "h1")):
        m.node("Gemm", [source, m.weight(f"w{i}", 4, 4), "c"], f"h{i}", f"fc{i}")
    m.output("h2")
    model = BACKEND.adopt(m.build())
    result = edited(model, SetBias("fc2", np.zeros(4)))
    g = BACKEND.graph(result)
    assert g.op("fc1").params[ParamRole.BIAS] == "c" != g.op("fc2").params[ParamRole.BIAS]
    assert np.array_equal(BACKEND.read(result, ["c"])["c"], BACKEND.read(model, ["c"])["c"])


def test_set_params_round_trip_in_every_layout():
    for proto in (b.small_cnn(), b.mlp()):
        model = BACKEND.adopt(proto)
        ids = list(BACKEND.graph(model).params)
        values = {k: np.random.default_rng(1).standard_normal(v.shape) for k, v in BACKEND.read(model, ids).items()}
        result = edited(model, SetParams(values))
        for id, got in BACKEND.read(result, ids).items():
            np.testing.assert_array_equal(got, values[id].astype(np.float32))


def test_bad_values_are_refused_before_anything_is_set():
    model = BACKEND.adopt(b.mlp())
    good = BACKEND.read(model, ["w1"])["w1"]
    for bad, text in ((np.zeros((6, 10)), r"'w1' has shape \(10, 6\)"), (np.full((10, 6), np.nan), "NaN")):
        with pytest.raises(ModelError, match=text):
            BACKEND.edit(model, [SetParams({"w1": bad})])
    with pytest.raises(ModelError, match=r"has shape \(10,\)"):
        BACKEND.edit(model, [SetBias("fc1", np.zeros(3))])
    with pytest.raises(ModelError, match="can't be given a bias"):
        BACKEND.edit(model, [SetBias("relu", np.zeros(3))])
    with pytest.raises(ModelError, match="no parameter 'q'"):
        BACKEND.edit(model, [SetParams({"q": np.zeros(3)})])
    assert np.array_equal(BACKEND.read(model, ["w1"])["w1"], good)


def test_relu6_becomes_relu_and_is_removed():
    model = BACKEND.adopt(b.small_cnn())
    result = edited(model, ReplaceActivation("relu6", "Relu"))
    g = BACKEND.graph(result)
    assert (
        g.op("relu6").kind is OpKind.RELU
        and g.op("relu6").outputs == ("r1",)
        and "six" not in result.graph.initializers
    )
    x = b.image(2, 3, 8, 8) * np.float32(0.1)
    np.testing.assert_allclose(outputs(result, x), outputs(model, x), atol=1e-6)  # nothing reaches 6 here
    gone = edited(result, RemoveOp("relu6"))
    assert BACKEND.graph(gone).op("dw").inputs == ("b1",) and BACKEND.graph(gone).op("add").inputs == ("b1", "r2")
    with pytest.raises(ModelError, match="possible are Identity, Relu"):
        BACKEND.edit(model, [ReplaceActivation("relu6", "Fancy")])
    with pytest.raises(ModelError, match="not an activation"):
        BACKEND.edit(model, [ReplaceActivation("dw", "Relu")])
    with pytest.raises(ModelError, match="can't be removed"):
        BACKEND.edit(model, [RemoveOp("add")])


def test_removing_the_last_op_hands_its_name_to_the_producer():
    model = BACKEND.adopt(b.small_cnn())
    result = edited(model, RemoveOp("softmax"))
    assert BACKEND.graph(result).op("fc").outputs == ("prob",) and BACKEND.graph(result).outputs == ("prob",)


def test_removing_an_op_between_input_and_output_leaves_an_identity():
    m = b.ModelBuilder()
    m.input("x", ["N", 3])
    m.node("Relu", ["x"], "y", "relu")
    m.output("y")
    result = edited(BACKEND.adopt(m.build()), RemoveOp("relu"))
    x = b.image(2, 3)
    assert np.array_equal(outputs(result, x), x)


def test_split_shared_weight():
    m = b.ModelBuilder()
    m.input("x", ["N", 4])
    m.weight("w", 4, 4)
    m.node("MatMul", ["x", "w"], "h", "fc1")
    m.node("MatMul", ["h", "w"], "y", "fc2")
    m.output("y")
    model = BACKEND.adopt(m.build())
    assert [o.id for o in BACKEND.graph(model).users("w")] == ["fc1", "fc2"]
    result = edited(model, SplitSharedParam("fc2", "w"), SetParams({"w": np.zeros((4, 4))}))
    g = BACKEND.graph(result)
    assert g.op("fc1").weight == "w" != g.op("fc2").weight
    np.testing.assert_array_equal(
        BACKEND.read(result, [g.op("fc2").weight])[g.op("fc2").weight], BACKEND.read(model, ["w"])["w"]
    )
    with pytest.raises(ModelError, match="no parameter 'q'"):
        BACKEND.edit(model, [SplitSharedParam("fc2", "q")])
    assert BACKEND.graph(edited(result, SplitSharedParam("fc1", "w"))).op("fc1").weight == "w"


def test_edited_models_can_be_saved(tmp_path):
    model = BACKEND.edit(BACKEND.adopt(b.mlp()), [SetBias("fc2", np.arange(4.0))])
    x = b.image(2, 3, 6)
    loaded = BACKEND.load(BACKEND.save(model, tmp_path / "m.onnx"))
    np.testing.assert_array_equal(outputs(loaded, x), outputs(model, x))
    assert [o.id for o in BACKEND.graph(loaded)] == [o.id for o in BACKEND.graph(model)]
