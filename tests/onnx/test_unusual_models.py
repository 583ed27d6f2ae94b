"""Models that operator tests show and zoos don't: newest and oldest opsets, sequences, empty tensors, odd shapes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import ModelBuilder
from onnx import TensorProto, helper

from bitwright import QuantSim
from bitwright.errors import BitwrightError, InputError, ModelError
from bitwright.graph import ConvAttrs
from bitwright.verify import verify
from bitwright_onnx.simulate.session import has_quantize_linear

NEWEST = onnx.defs.onnx_opset_version()


def _without_optimizations(path, feeds):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options).run(None, feeds)


@pytest.mark.parametrize("activations", ["uint8", "uint16", "uint12"])
def test_opsets_whose_quantize_linear_the_runtime_lacks(tmp_path, activations, monkeypatch):
    opset = next((o for o in range(21, NEWEST + 1) if not has_quantize_linear(o)), None)
    if opset is None:  # this runtime has all: take one away
        opset = NEWEST
        for module in ("lowering", "qdq"):
            monkeypatch.setattr(f"bitwright_onnx.{module}.has_quantize_linear", lambda _: False)
    b = ModelBuilder(opset=opset)
    y = b.output("y", ["n", 4])
    b.node("Celu", [b.node("Gemm", [b.input("x", ["n", 6]), b.weight("w", 6, 4)], "h")], y)
    model = b.build(ir_version=10)
    x = {"x": b.rng.standard_normal((32, 6)).astype(np.float32)}
    sim = QuantSim(model, weights="int8", activations=activations).calibrate(x)
    (real,), (simulated,) = sim.predict(x, simulated=False), sim.predict(x)
    assert 0 < np.abs(simulated - real).max() < 0.1
    file = sim.export(tmp_path).files["qdq"]
    np.testing.assert_allclose(_without_optimizations(file, x)[0], simulated, atol=1e-5)
    assert {n.domain for n in onnx.load(file).graph.node if "izeLinear" in n.op_type} == {"com.microsoft"}


def test_opset_6_models_are_converted():
    w = onnx.numpy_helper.from_array(np.array([[1.0, 2], [3, 4]], np.float32), "w")
    c = onnx.numpy_helper.from_array(np.array([10.0, 20], np.float32), "c")
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in ("x", "y")]
    wc = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("w", [2, 2]), ("c", [2]))]
    nodes = [helper.make_node("Gemm", ["x", "w", "c"], ["y"], "gemm", broadcast=1, transB=1)]
    graph = helper.make_graph(nodes, "old", [infos[0], *wc], [infos[1]], [w, c])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=3)
    sim = QuantSim(model)
    np.testing.assert_allclose(sim.predict({"x": np.ones((1, 2), np.float32)}, simulated=False)[0], [[13, 27]])
    assert sim.graph.producer("y").id == "gemm"


def test_sequences_inside_of_a_model(tmp_path):
    b = ModelBuilder(opset=17)
    x, w = b.input("x", ["n", 4]), b.weight("w", 4, 4)
    b.node("Gemm", [x, w], "h")
    b.node("SequenceConstruct", [x, "h"], "s")
    b.node("Identity", ["s"], "t")
    b.node("SequenceAt", ["t", b.const("one", np.int64(1))], "u")
    b.node("Gemm", ["u", w], b.output("y", ["n", 4]))
    fed = {"x": b.rng.standard_normal((8, 4)).astype(np.float32)}
    sim = QuantSim(b.build())
    assert not sim.graph.tensors["s"].is_float
    (real,), (simulated,) = sim.predict(fed, simulated=False), sim.calibrate(fed).predict(fed)
    np.testing.assert_allclose(real, fed["x"] @ np.linalg.matrix_power(sim.params["w"].T, 2), atol=1e-5)
    assert 0 < np.abs(simulated - real).max() < 0.1
    file = sim.export(tmp_path).files["qdq"]
    np.testing.assert_allclose(_without_optimizations(file, fed)[0], simulated, atol=1e-5)


@pytest.mark.parametrize("what", ["input", "output"])
def test_models_of_sequences_are_refused_when_they_are_opened(what):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    s = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    i = onnx.numpy_helper.from_array(np.int64(0), "i")
    ends = ([s], [x]) if what == "input" else ([x], [s])
    node = helper.make_node("SequenceAt", ["s", "i"], ["x"]) if what == "input" else helper.make_node(
        "SequenceConstruct", ["x"], ["s"])  # fmt: skip
    graph = helper.make_graph([node], "g", *ends, [i] if what == "input" else [])
    with pytest.raises(ModelError, match=f"{what} 's' is a sequence of tensors"):
        QuantSim(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_a_transposed_convolution_may_be_asked_for_more_than_its_window_reaches():
    b = ModelBuilder(opset=17)
    b.node("ConvTranspose", [b.input("x", [1, 2, 3, 3]), b.weight("w", 2, 2, 3, 3)], b.output("y"),
           strides=[3, 2], output_shape=[10, 8])  # fmt: skip
    sim = QuantSim(b.build())
    attrs = sim.graph.producer("y").attrs
    # 3·2 + 3 = 9 rows and 2·2 + 3 = 7 columns lie under the kernel; one more of each is asked for.
    assert isinstance(attrs, ConvAttrs) and attrs.output_padding == (1, 1) and attrs.pads == ((0, 0), (0, 0))
    assert sim.predict({"x": np.ones((1, 2, 3, 3), np.float32)}, simulated=False)[0].shape == (1, 2, 10, 8)


def test_what_is_always_empty_has_no_range():
    b = ModelBuilder(opset=17)
    x = b.input("x", ["n", 4])
    b.node("Slice", [x, *(b.const(n, np.array([v])) for n, v in (("from", 0), ("to", 0), ("axis", 1)))], "none")
    b.node("Exp", ["none"], "e")
    b.node("ReduceSum", ["e"], b.output("y"), keepdims=0)
    with pytest.raises(BitwrightError, match="no calibration data reached"):
        QuantSim(b.build()).calibrate({"x": np.ones((2, 4), np.float32)})


def _old(nodes, opset, **constants):
    """A model of before opset 7: every initializer is an input too."""
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 3, 4])]
    infos += [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in constants.items()]
    inits = [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(
        helper.make_graph(nodes, "old", infos, [out], inits),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=3,
    )


X = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4) - 10
C = np.array([1.0, 2.0], np.float32)
PER_CHANNEL = C[None, :, None, None]


@pytest.mark.parametrize(
    ("nodes", "opset", "expected"),
    [
        ([("Add", ["x", "c"], ["y"], {"broadcast": 1, "axis": 1})], 6, X + PER_CHANNEL),
        ([("Mul", ["x", "c"], ["y"], {"broadcast": 1, "axis": 1})], 1, X * PER_CHANNEL),
        ([("Sub", ["x", "r"], ["y"], {"broadcast": 1})], 6, X - np.arange(4, dtype=np.float32)),
        ([("PRelu", ["x", "c"], ["y"], {})], 6, np.where(X < 0, X * PER_CHANNEL, X)),
        (
            [("Neg", ["c"], ["d"], {}), ("Add", ["x", "d"], ["y"], {"broadcast": 1, "axis": 1})],
            6,
            X - PER_CHANNEL,
        ),
        (
            [
                ("GlobalAveragePool", ["x"], ["p"], {}),
                ("Reshape", ["p", "two"], ["q"], {}),
                ("Add", ["x", "q"], ["y"], {"broadcast": 1, "axis": 1}),
            ],
            6,
            X + X.mean(axis=(2, 3), keepdims=True),
        ),
    ],
    ids=["add", "mul of opset 1", "trailing", "slopes", "folded", "computed"],
)
def test_broadcasting_of_opset_6(nodes, opset, expected):
    made = [helper.make_node(op, i, o, o[0], **attrs) for op, i, o, attrs in nodes]
    used = {n for _, i, _, _ in nodes for n in i}
    constants = {n: a for n, a in {"c": C, "r": np.arange(4, dtype=np.float32)}.items() if n in used}
    model = _old(made, opset, **constants)
    if "two" in used:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2]), "two"))
        model.graph.input.append(helper.make_tensor_value_info("two", TensorProto.INT64, [1]))
    (y,) = QuantSim(model).predict({"x": X}, simulated=False)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_strings_go_through_every_view(tmp_path):
    b = ModelBuilder(opset=20)
    s = b.input("s", [2], TensorProto.STRING)
    b.node("StringConcat", [s, b.const("end", np.array(["!", "?"], object))], b.output("t", [2], TensorProto.STRING))
    b.node("Gemm", [b.input("x", [2, 4]), b.weight("w", 4, 3)], b.output("y", [2, 3]))
    feed = _Once({"s": np.array(["a", "b"], object), "x": b.rng.standard_normal((2, 4)).astype(np.float32)})
    sim = QuantSim(b.build()).calibrate(feed)
    assert sim.predict(feed)[0].tolist() == ["a!", "b?"]
    sim.export(tmp_path)
    assert verify(tmp_path, feed).problems == []


class _Once:
    """One run as a data set."""

    samples = 2

    def __init__(self, feed):
        self.feed = feed

    def __iter__(self):
        yield dict(self.feed)

    def fingerprint(self):
        return "once"


@pytest.mark.parametrize("widths", [(3, 1), (4, 6)], ids=["a first axis that isn't the batch", "of two lengths"])
def test_inputs_without_a_batch_are_verified(tmp_path, widths):
    b = ModelBuilder(opset=17)
    x, y = b.input("x", [widths[0], 5]), b.input("y", [5, widths[1]])
    b.node("MatMul", [x, y], "h")
    b.node("ReduceSum", ["h"], b.output("z"), keepdims=0)
    feed = _Once({n: b.rng.standard_normal(s).astype(np.float32) for n, s in (("x", (widths[0], 5)),
                                                                             ("y", (5, widths[1])))})  # fmt: skip
    sim = QuantSim(b.build()).calibrate(feed)
    sim.export(tmp_path)
    assert verify(tmp_path, feed).problems == []


def test_float16_arithmetic_is_coarser_than_grids_of_16_bits(tmp_path):
    """Its last place is dozens of steps; that is not a departure of the runtime, and a factor of 1.1 is one."""
    b = ModelBuilder(opset=17)
    x = b.input("x", ["n", 64], TensorProto.FLOAT16)
    b.node("Mul", [x, b.const("c", np.full(64, 0.7071, np.float16))], "h")
    b.node("Softmax", ["h"], "s")
    b.node("Mul", ["s", "h"], b.output("y", ["n", 64], TensorProto.FLOAT16))
    data = {"x": b.rng.standard_normal((8, 64)).astype(np.float16)}
    sim = QuantSim(b.build(), weights="int16", activations="uint16", scheme="minmax").calibrate(data)
    bundle = sim.export(tmp_path)
    assert verify(tmp_path, data).problems == []
    file = onnx.load(bundle.files["qdq"])
    scale = next(t for t in file.graph.initializer if t.name == "c_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.1), "c_scale"))
    onnx.save(file, bundle.files["qdq"])
    assert verify(tmp_path, data).problems


def test_scores_in_float16_move_a_softmax_in_float32(tmp_path):
    """By the last place of the coarser type, which no operand that the runtime hands out takes away (a mask's sum)."""
    b = ModelBuilder(opset=17)
    x = b.input("x", ["n", 8, 16], TensorProto.FLOAT16)
    b.node("Transpose", [x], "xt", perm=[0, 2, 1])
    b.node("MatMul", [x, "xt"], "s")
    b.node("Add", ["s", b.const("mask", np.triu(np.full((8, 8), -np.inf, np.float16), 1))], "masked")
    b.node("Cast", ["masked"], "wide", to=TensorProto.FLOAT)
    b.node("Softmax", ["wide"], "p")
    b.node("Mul", ["p", b.const("c", np.full(8, 0.7, np.float32))], b.output("y", ["n", 8, 8]))
    data = {"x": (b.rng.standard_normal((8, 8, 16)) * 0.5).astype(np.float16)}
    sim = QuantSim(b.build(), weights="int16", activations="uint16", scheme="minmax").calibrate(data)
    sim.export(tmp_path)
    assert verify(tmp_path, data).problems == []


@pytest.mark.parametrize("scheme", ["minmax", "sqnr", "percentile"])
def test_nan_in_an_output_is_refused_by_every_scheme(scheme):
    b = ModelBuilder(opset=17)
    b.node("Sqrt", [b.input("x", ["n", 6])], b.output("y", ["n", 6]))
    x = np.abs(b.rng.standard_normal((32, 6))).astype(np.float32)
    x[20, 3] = -1
    sim = QuantSim(b.build(), scheme=scheme)
    with pytest.raises(InputError, match=r"'y'.*NaN"):
        sim.calibrate({"x": x})


@pytest.mark.parametrize("bits", [8, 16])
def test_a_sum_of_more_than_two(bits, tmp_path):
    b = ModelBuilder(opset=17)
    operands = [b.input("x", ["n", 6]), *(b.weight(n, 6) for n in ("c", "d"))]
    b.node("Sum", operands, b.output("y", ["n", 6]))
    data = {"x": b.rng.standard_normal((8, 6)).astype(np.float32)}
    sim = QuantSim(b.build(), weights=f"int{bits}", activations=f"uint{bits}").calibrate(data)
    sim.export(tmp_path)
    assert verify(tmp_path, data).problems == []
