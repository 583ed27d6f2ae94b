"""A default ONNX Runtime session: what can saturate in it on some hosts, exports that can't, and what verify says."""

from __future__ import annotations

import functools
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from kernels_run import runtime_ops
from onnx import helper, numpy_helper
from small_nets import proto

from bitwright.backend import Bundle, Tap
from bitwright.bundle import PairRisk, PlainRisks, _plain
from bitwright.bundle import _saturation as saturation
from bitwright.bundle._outputs import OutputPair, OutputSums
from bitwright.errors import ModelError
from bitwright.grids import PerChannel, QuantSpec, encoding_of_weights
from bitwright.simulation import QuantSim
from bitwright.verify import _integer_kernels as integer_kernels
from bitwright.verify import sqnr, verify
from bitwright_onnx.export import plain_session
from bitwright_onnx.export.plain_session import PlainSession, keep_exact, risks_of, saturates_here
from bitwright_onnx.simulate.session import session_options

N = helper.make_node
RNG = np.random.default_rng(0)


def net():
    """A convolution over three channels, a grouped one, a depthwise one, Gemm and MatMul."""

    def normal(*shape):
        return RNG.normal(size=shape)

    nodes = [
        N("Conv", ["x", "w1"], ["c1"], kernel_shape=[3, 3]), N("Relu", ["c1"], ["r1"]),
        N("Conv", ["r1", "w2"], ["c2"], kernel_shape=[1, 1], group=2), N("Relu", ["c2"], ["r2"]),
        N("Conv", ["r2", "w3"], ["c3"], kernel_shape=[3, 3], group=12), N("GlobalAveragePool", ["c3"], ["p"]),
        N("Flatten", ["p"], ["f"]), N("Gemm", ["f", "w4", "b4"], ["g"], transB=1), N("MatMul", ["g", "w5"], ["y"]),
    ]  # fmt: skip
    weights = {"w1": normal(8, 3, 3, 3), "w2": normal(12, 4, 1, 1), "w3": normal(12, 1, 3, 3), "w4": normal(10, 12),
               "b4": normal(10), "w5": normal(10, 6)}  # fmt: skip
    return proto(nodes, {"x": ["N", 3, 8, 8]}, ["y"], weights)


NET = net()
DATA = {"x": RNG.uniform(0, 1, (16, 3, 8, 8)).astype(np.float32)}


def calibrated(target="generic-int8", model=NET, data=DATA, **options):
    return QuantSim(model, target=target, **options).calibrate(data)


def plain_output(path, data=DATA):
    session = ort.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(data))[0]


# -- the proof


def test_risks_are_those_of_the_codes(tmp_path):
    sim = calibrated()
    risks = risks_of(sim.export(tmp_path).files["qdq"])
    wanted = {}
    for op in sim.graph.linear_ops:
        codes = sim.encodings[op.weight].quantize(np.asarray(sim.params[op.weight]))
        if op.weight != "w3":  # depthwise
            wanted[op.weight] = (op.id, int(saturation.bound(codes).channels.sum()), len(codes))
    assert {r.weight: (r.op, r.channels, r.of) for r in risks.pairs} == wanted
    assert all(channels > 0 for _, channels, _ in wanted.values())
    assert risks.rounded == ()


@pytest.mark.filterwarnings("ignore:weights of unsigned codes")
@pytest.mark.parametrize("options", [{"weights": "int4"}, {"activations": "uint16"}, {"weights": "uint8"}])
def test_other_kernels_have_no_pairs(tmp_path, options):
    assert risks_of(calibrated(**options).export(tmp_path).files["qdq"]).pairs == ()


def test_weights_that_are_moved_on_their_way(tmp_path):
    """A transposed weight is laid out exactly; behind a reshape the largest two codes might meet."""
    model = proto(
        [N("Transpose", ["a"], ["at"], perm=[1, 0]), N("MatMul", ["x", "at"], ["m"]),
         N("Reshape", ["b", "shape"], ["br"]), N("MatMul", ["m", "br"], ["y"])],
        {"x": ["N", 4]}, ["y"], {"a": np.zeros((2, 4)), "b": np.zeros((4, 1))},
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 2], np.int64), "shape"))

    def dequantized(name, codes, graph):
        for key, value in (("q", codes), ("s", np.float32(0.1)), ("z", np.int8(0))):
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}_{key}"))
        graph.node.insert(0, N("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [name], name=f"{name}_dq"))

    graph = model.graph
    kept = [t for t in graph.initializer if t.name == "shape"]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    dequantized("a", np.array([[100, 0, 100, 0], [60, 69, 0, 0]], np.int8), graph)
    dequantized("b", np.array([[100], [-5], [100], [3]], np.int8), graph)
    for tensor in ("x", "m"):
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[0] == tensor:
                node.input[0] = f"{tensor}_dq"
        at = next((i + 1 for i, n in enumerate(graph.node) if tensor in n.output), 0)
        for key, value in (("s", np.float32(0.1)), ("z", np.uint8(0))):
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{tensor}_{key}"))
        graph.node.insert(at, N("DequantizeLinear", [f"{tensor}_q", f"{tensor}_s", f"{tensor}_z"], [f"{tensor}_dq"]))
        graph.node.insert(at, N("QuantizeLinear", [tensor, f"{tensor}_s", f"{tensor}_z"], [f"{tensor}_q"]))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert {r.weight: (r.channels, r.of) for r in risks_of(path).pairs} == {"a": (1, 2), "b": (1, 1)}
    batch = {"x": np.full((2, 4), 5, np.float32)}
    before = plain_output(path, batch)
    assert set(keep_exact(path)) == {"a", "b"}
    assert risks_of(path).pairs == ()
    np.testing.assert_array_equal(plain_output(path, batch), before)


@pytest.mark.skipif(not saturates_here(), reason="this CPU doesn't saturate")
@pytest.mark.parametrize(
    ("channels", "kernel", "group"), [(8, 1, 1), (7, 1, 1), (3, 3, 1), (4, 3, 1), (6, 2, 2), (2, 3, 2)]
)
def test_the_order_of_products_is_the_runtimes(channels, kernel, group):
    """Where two weights of 127 lose something, they are neighbours in `in_order`."""
    length = channels // group * kernel**2
    pairs = [(i, j) for i in range(length) for j in range(i)]
    rows = np.zeros((len(pairs), length), np.int8)
    for row, (i, j) in zip(rows, pairs, strict=True):
        row[[i, j]] = 127
    weight = np.tile(rows.reshape(-1, channels // group, kernel, kernel), (group, 1, 1, 1))
    arrays = {"w": weight, "s": np.float32(1), "t": np.float32(256), "z": np.uint8(0), "wz": np.int8(0)}
    node = N("QLinearConv", ["x", "s", "z", "w", "s", "wz", "t", "z"], ["y"], group=group)
    ends = [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [1, channels, kernel, kernel]),
            helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)]  # fmt: skip
    weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.full((1, channels, kernel, kernel), 255, np.uint8)})[0].reshape(-1)
    assert set(found) == {128, 253}  # 32,767 and 2 · 127 · 255, in units of 256
    assert ((found == 128) == saturation.bound(weight).channels).all()


# -- exports that can't saturate


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("target", ["generic-int8", "per_tensor"])
def test_kept_exact_is_the_same_in_uint8(tmp_path, target, activations):
    sim = calibrated(target, activations=activations)
    loose, tight = (sim.export(tmp_path / str(p), plain_session=p) for p in (False, True))
    assert loose.stored_anew == ()
    assert set(tight.stored_anew) == {r.weight for r in risks_of(loose.files["qdq"]).pairs} >= {"w1", "w2"}
    path = tight.files["qdq"]
    onnx.checker.check_model(str(path), full_check=True)
    assert risks_of(path).pairs == ()
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert stored["w1_quantized"].dtype == stored["w1_zero_point"].dtype == np.uint8
    assert (stored["w1_zero_point"] == 128).all()
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(loose.files["qdq"]).graph.initializer}
    np.testing.assert_array_equal(stored["w1_quantized"].astype(int) - 128, before["w1_quantized"])
    np.testing.assert_array_equal(PlainSession(path).run(DATA).popitem()[1], sim_output(loose))
    ops = runtime_ops(path)
    assert (ops.counts["QLinearConv"], ops.counts["QGemm"], ops.counts["QLinearMatMul"]) == (3, 1, 1)


def sim_output(bundle):
    """The session with options, which is exact on every host."""
    from bitwright_onnx.export.runtime import IntegerSession

    return IntegerSession(bundle.files["qdq"]).run(DATA).popitem()[1]


def test_the_target_raises_scales_and_stores_the_rest(tmp_path):
    wide, limited = calibrated(), calibrated("onnxruntime-cpu")
    bundle = limited.export(tmp_path / "a")
    assert bundle.stored_anew == ("w1",)  # the first convolution, whose errors reach everything
    assert risks_of(bundle.files["qdq"]).pairs == ()
    np.testing.assert_array_equal(limited.encodings["w1"].scale, wide.encodings["w1"].scale)
    for weight in ("w2", "w4", "w5"):
        ratio = limited.encodings[weight].scale / wide.encodings[weight].scale
        assert 1.2 < ratio.max() < 2.04
        assert ratio.min() >= 1
    np.testing.assert_array_equal(limited.encodings["w3"].scale, wide.encodings["w3"].scale)  # depthwise
    # What came in by hand, or from training, keeps its codes: it is stored as uint8.
    limited.set({"w2": wide.encodings["w2"]})
    assert limited.export(tmp_path / "b").stored_anew == ("w1", "w2")
    assert json.loads((tmp_path / "b" / "report.json").read_text())["record"]["stored_anew"] == ["w1", "w2"]
    assert verify(tmp_path / "b", DATA).problems == []
    assert limited.export(tmp_path / "c", plain_session=False).stored_anew == ()


@pytest.mark.parametrize("technique", ["adaround", "gptq", "seq_mse", "weight_clipping", "cross_layer_equalization"])
def test_techniques_keep_the_limit(tmp_path, technique):
    sim = QuantSim(NET, target="onnxruntime-cpu").apply(technique, DATA).calibrate(DATA)
    bundle = sim.export(tmp_path)
    assert set(bundle.stored_anew) <= {"w1"}
    assert risks_of(bundle.files["qdq"]).pairs == ()


def test_wide_activations_are_said_to_be_rounded(tmp_path):
    model = proto([N("Relu", ["x"], ["r"]), N("MatMul", ["r", "w"], ["y"])], {"x": ["N", 64]}, ["y"],
                  {"w": RNG.normal(size=(64, 32))})  # fmt: skip
    data = {"x": RNG.normal(size=(16, 64)).astype(np.float32)}
    for options, rounded in (({"activations": "uint16"}, ("w",)), ({"weights": "int4:block32"}, ())):
        path = calibrated(model=model, data=data, **options).export(tmp_path / str(len(rounded))).files["qdq"]
        assert risks_of(path).rounded == rounded
        assert ("MatMulNBits" in runtime_ops(path).counts) == bool(rounded)


# -- verify


def avx2(sim, data):
    """The output of a convolution and ReLU as x64 computes it without VNNI."""
    op, out = sim.graph.op("conv_0"), sim.table["y"]
    inputs, weight = sim.table["x"], sim.table["w"]
    codes = weight.quantize(np.asarray(sim.params["w"]))
    total, lost = saturation.accumulate(op, inputs.quantize(data["x"]), inputs, codes, 1)
    total = np.moveaxis(total.reshape(8, 16, 6, 6), 0, 1).astype(np.float64)
    scale = integer_kernels.along(np.asarray(inputs.scale * weight.scale, np.float32), 4, 1)
    return out.dequantize(integer_kernels.requantize(total, scale, out, int(out.zero_point), 255)), lost


def case():
    uniform = np.random.default_rng(0).uniform
    model = proto([N("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3]), N("Relu", ["c"], ["y"])],
                  {"x": ["N", 4, 8, 8]}, ["y"], {"w": uniform(-1, 1, (8, 4, 3, 3)), "b": np.zeros(8)})  # fmt: skip
    return model, {"x": uniform(0, 1, (16, 4, 8, 8)).astype(np.float32)}


def test_verify_shows_what_a_saturating_host_computes(tmp_path, monkeypatch):
    """The figures are those of ONNX Runtime 1.32 on an emulated Haswell: 22.7 dB, where 48.2 are promised."""
    model, data = case()
    sim = calibrated("default", model, data)
    sim.export(tmp_path)
    wrong, lost = avx2(sim, data)
    assert lost > 0
    name = next(iter(PlainSession(tmp_path / "model.qdq.onnx").run(data)))
    if not saturates_here():
        parts = iter((wrong[:8], wrong[8:]))
        monkeypatch.setattr(plain_session.PlainSession, "run", lambda self, batch: {name: next(parts)})
    found = verify(tmp_path, data)
    assert found.plain.sqnr_db == pytest.approx(22.74, abs=0.02)
    assert found.sqnr_db["integer_float"] == pytest.approx(48.23, abs=0.02)
    assert len(found.problems) == 1
    for word in ("22.7 dB", "48.2", "--plain-session", "session.x64quantprecision"):
        assert word in found.problems[0]
    assert (found.plain.layers, found.plain.channels, found.plain.weights) == (1, 8, ["w"])


def test_no_host_saturates_on_the_targets_export(tmp_path):
    model, data = case()
    sim = calibrated("onnxruntime-cpu", model, data)
    wide = sim.encodings["w"]
    limited = encoding_of_weights(np.asarray(sim.params["w"]), QuantSpec(8, granularity=PerChannel(0), pair_limit=128))
    assert (limited.scale > wide.scale).any()
    bundle = sim.set({"w": limited}).export(tmp_path)
    assert bundle.stored_anew == ()
    exact, lost = avx2(sim, data)
    assert lost == 0
    np.testing.assert_array_equal(PlainSession(bundle.files["qdq"]).run(data).popitem()[1], exact)
    found = verify(tmp_path, data)
    assert found.problems == []
    assert (found.plain.layers, found.plain.differs, found.plain.problem) == (0, 0.0, "")
    assert found.plain.sqnr_db == found.sqnr_db["integer_float"]
    assert "on any host" in found.plain.proof
    assert json.loads(found.model_dump_json())["plain"]["layers"] == 0


@pytest.mark.parametrize(
    ("plain", "risky", "rounded", "said"),
    [(30.0, True, False, True), (39.5, True, False, False), (30.0, False, False, True), (30.0, False, True, False)],
)
def test_when_it_is_a_problem(plain, risky, rounded, said):
    risks = PlainRisks((PairRisk("w", "conv", 3, 8),) if risky else (), ("v",) if rounded else (), "an option", "b")
    beside = OutputPair(1.0, 1.0, different=6, values=6, compared=True)
    sums = {"plain_float": pair_of(plain), "integer_float": pair_of(40.0), "plain_integer": beside}
    assert bool(_plain._problem(risks, {"y": sums})) == said
    assert bool(_plain._rounding(risks)) == rounded
    good = {**sums, "plain_float": pair_of(40.0), "plain_integer": OutputPair(1.0, values=6, compared=True)}
    assert _plain._problem(risks, {"y": good}) == ""
    said_of = _plain._problem(risks, {"y": good, "z": sums})
    assert bool(said_of) == said and ("output 'z'" in said_of) == said


def test_figures_are_of_outputs_that_a_plain_session_hands_out(tmp_path):
    """One that it lacks, which is told as a problem, has no figure; infinity is that of equal values."""
    model, data = case()
    bundle = calibrated("default", model, data).export(tmp_path)
    lacking = {"plain_float": OutputPair(), "integer_float": pair_of(40.0), "plain_integer": OutputPair()}
    there = {"plain_float": pair_of(30.0), "integer_float": pair_of(40.0), "plain_integer": pair_of(35.0)}
    of = functools.partial(_plain.plain_view, bundle, ["r", "y"], labels=None)
    assert of(OutputSums({}, 6, {"r": lacking, "y": there}, [])).sqnr_db == pytest.approx(30.0)
    assert of(OutputSums({}, 6, {"r": lacking, "y": lacking}, [])) is None


def pair_of(decibels):
    return OutputPair(1.0, 10 ** (-decibels / 10), values=6, compared=True)


def several():
    """A convolution that saturates on x64 without VNNI is the second output; the first doesn't."""
    uniform = np.random.default_rng(0).uniform
    model = proto([N("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3]), N("Relu", ["c"], ["y"]),
                   N("Relu", ["x"], ["r"])], {"x": ["N", 4, 8, 8]}, ["r", "y"],
                  {"w": uniform(-1, 1, (8, 4, 3, 3)), "b": np.zeros(8)})  # fmt: skip
    return model, {"x": uniform(0, 1, (16, 4, 8, 8)).astype(np.float32)}


def test_verify_looks_at_every_output_of_a_plain_session(tmp_path, monkeypatch, run):
    model, data = several()
    sim = calibrated("default", model, data)
    sim.export(tmp_path)
    wrong, lost = avx2(sim, data)
    assert lost > 0
    if not saturates_here():
        parts = iter((wrong[:8], wrong[8:]) * 2)
        right = plain_session.PlainSession.run
        monkeypatch.setattr(plain_session.PlainSession, "run",
                            lambda self, batch: {**right(self, batch), Tap("y"): next(parts)})  # fmt: skip
    found = verify(tmp_path, data)
    assert found.outputs[0].sqnr_db["plain_float"] == found.outputs[0].sqnr_db["integer_float"] == found.plain.sqnr_db
    assert found.outputs[1].sqnr_db["plain_float"] == pytest.approx(22.74, abs=0.02)
    assert found.outputs[1].sqnr_db["integer_float"] == pytest.approx(48.23, abs=0.02)
    assert 0 < found.plain.differs < 1
    assert len(found.problems) == 1
    assert "22.7 dB" in found.problems[0] and "output 'y'" in found.problems[0]
    np.savez(tmp_path / "data.npz", **data)
    result = run("verify", tmp_path, "--data", tmp_path / "data.npz", "-q")
    assert result.status == 1 and "plain session 22.7 dB" in result.out


@pytest.mark.parametrize("when", ["opened", "run"])
def test_a_plain_session_that_refuses_is_a_problem(tmp_path, monkeypatch, when):
    model, data = several()
    calibrated("default", model, data).export(tmp_path)

    def refused(*_):
        raise ModelError("no kernel")

    monkeypatch.setattr(plain_session.PlainSession, "__init__" if when == "opened" else "run", refused)
    found = verify(tmp_path, data)
    assert found.problems == ["a default session refuses the export: no kernel"]
    assert found.plain is None
    assert found.sqnr_db["integer_float"] > 30 and "plain_float" not in found.outputs[0].sqnr_db


def test_notes_of_the_host():
    (note,) = plain_session.host_notes()
    assert ("saturate" in note) == saturates_here()
    assert sqnr(np.ones(3), np.ones(3)) == float("inf")
    assert Bundle({}).stored_anew == ()


# -- float weights between quantized tensors, which a default session would round to 8 bits per tensor


def uneven(*shape):
    """Weights of channels a thousand times apart: one scale for all loses most of them."""
    return RNG.normal(size=shape) * np.logspace(-2, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def whole(name, *numbers):
    return N("Constant", [], [name], value_ints=numbers)


FLOAT_WEIGHTS = {
    "Conv": ([N("Conv", ["x", "w", "b"], ["y"], kernel_shape=[3, 3])], {"w": uneven(8, 4, 3, 3), "b": uneven(8)}),
    "Conv, Relu": ([N("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]), N("Relu", ["c"], ["y"])],
                   {"w": uneven(8, 4, 3, 3)}),
    "ConvTranspose": ([N("ConvTranspose", ["x", "w"], ["y"], kernel_shape=[3, 3])], {"w": uneven(4, 8, 3, 3)}),
    "Gemm": ([N("Flatten", ["x"], ["f"]), N("Gemm", ["f", "w", "b"], ["y"], transB=1)],
             {"w": uneven(6, 256), "b": uneven(6)}),
    "MatMul, Add": ([N("Flatten", ["x"], ["f"]), N("MatMul", ["f", "w"], ["m"]), N("Add", ["m", "b"], ["y"])],
                    {"w": uneven(6, 256).T, "b": uneven(6)}),
    "MaxPool, Conv": ([N("MaxPool", ["x"], ["p"], kernel_shape=[2, 2]), N("Conv", ["p", "w"], ["y"])],
                      {"w": uneven(8, 4, 1, 1)}),
    "Pad, Conv": ([whole("pads", 0, 0, 1, 1, 0, 0, 1, 1), N("Pad", ["x", "pads"], ["p"]), N("Conv", ["p", "w"], ["y"])],
                  {"w": uneven(8, 4, 3, 3)}),
    "Dropout, Conv": ([N("Dropout", ["x"], ["p"]), N("Conv", ["p", "w"], ["y"])], {"w": uneven(8, 4, 3, 3)}),
    "Dropout without ratio, Conv": ([N("Dropout", ["x", ""], ["p"]), N("Conv", ["p", "w"], ["y"])],
                                    {"w": uneven(8, 4, 3, 3)}),
    "Expand, Conv": ([whole("shape", 1, 1, 1, 1), N("Expand", ["x", "shape"], ["p"]), N("Conv", ["p", "w"], ["y"])],
                     {"w": uneven(8, 4, 3, 3)}),
    "Reshape by a computed shape, Gemm": (
        [N("Shape", ["x"], ["s"]), whole("at", 0), whole("to", 1), N("Slice", ["s", "at", "to"], ["n"]),
         whole("rest", 256), N("Concat", ["n", "rest"], ["sizes"], axis=0), N("Reshape", ["x", "sizes"], ["f"]),
         N("Gemm", ["f", "w"], ["y"], transB=1)],
        {"w": uneven(6, 256)}),
}  # fmt: skip


@pytest.mark.parametrize("kept", ["float", "float16"])
@pytest.mark.parametrize("form", FLOAT_WEIGHTS)
def test_float_weights_are_left_in_float(tmp_path, form, kept):
    """ONNX Runtime's WeightBiasQuantization finds no such op in the file: a default session computes what it says."""
    nodes, weights = FLOAT_WEIGHTS[form]
    data = {"x": RNG.uniform(0, 1, (8, 4, 8, 8)).astype(np.float32)}
    model = proto(nodes, {"x": ["N", 4, 8, 8]}, ["y"], weights)
    between = {name: "float" for node in nodes for name in node.output if name in ("p", "f")}
    sim = calibrated(model=model, data=data, overrides={"w": kept} | between)
    path = sim.export(tmp_path).files["qdq"]
    literal = session_options()
    literal.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    said = ort.InferenceSession(str(path), literal, providers=["CPUExecutionProvider"]).run(None, dict(data))[0]
    step = sim.encodings["y"].scale.max()
    far = np.abs(plain_output(path, data) - said) > 1e-3 * step
    assert far.mean() < 0.002  # a sum in another order falls on the other side now and then
    assert any(node.op_type == "Max" for node in onnx.load(path).graph.node)


def test_quantized_weights_and_float_activations_get_no_guard(tmp_path):
    for options in ({}, {"activations": "float", "overrides": {"w1": "float"}}):
        path = calibrated(**options).export(tmp_path / str(len(options))).files["qdq"]
        assert not any(node.op_type == "Max" for node in onnx.load(path).graph.node)
