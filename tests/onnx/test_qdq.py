from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from small_nets import (
    ACTIVATION,
    conv_net,
    encoding,
    encodings_of,
    identity_net,
    midpoints,
    opened,
    plan_of,
    proto,
)

from bitwright.errors import EncodingError, InputError
from bitwright.grids import Blockwise, Encoding, PerChannel, QuantSpec, encoding_of_weights
from bitwright.placement import Float, SharedWith, SiteKind
from bitwright_onnx.export.qdq import write_qdq
from bitwright_onnx.graph.params import read_params


def reference(path, feeds, outputs=None):
    """The file's meaning: every op as it stands, nothing fused."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options).run(outputs, feeds)[0]


def initializers(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def pairs(model, site):
    """Q and DQ nodes whose scale is the site's."""
    mine = [n for n in model.graph.node if len(n.input) > 1 and n.input[1] == f"{site}_scale"]
    return sorted(n.op_type for n in mine)


@pytest.mark.parametrize(
    ("spec", "opset"),
    [
        (QuantSpec(8, signed=False, symmetric=False), 17),
        (QuantSpec(8), 17),
        (QuantSpec(8, strict=True), 17),
        (QuantSpec(5, signed=False, symmetric=False), 17),
        (QuantSpec(6, strict=True), 17),
        (QuantSpec(4, signed=False, symmetric=False), 21),
        (QuantSpec(4), 21),
        (QuantSpec(3), 17),
        (QuantSpec(4, strict=True), 17),
        (QuantSpec(16, signed=False, symmetric=False), 21),
        (QuantSpec(16), 21),
        (QuantSpec(12), 21),
        (QuantSpec(16, strict=True), 21),
    ],
    ids=str,
)
def test_single_op_models_are_bit_equal(tmp_path, spec, opset):
    native, graph = identity_net("Identity")
    plan = plan_of(graph, activation=spec, overrides={"y": Float("tested alone")})
    grid = encoding(spec, 0.037, 0 if spec.symmetric else spec.grid.qmax // 3)
    report = write_qdq(native, graph, plan, {"x": grid}, tmp_path / "m.onnx")
    model = onnx.load(report.path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == opset
    assert pairs(model, "x") == ["DequantizeLinear", "QuantizeLinear"]
    assert report.names == {"x": "x_dequantized"}
    x = midpoints(0.037, (1001, 4))
    np.testing.assert_array_equal(reference(report.path, {"x": x}), grid.fake_quantize(x))


@pytest.mark.parametrize("format", ["float16", "bfloat16", "float8e4m3fn", "float8e5m2"])
def test_float_formats(tmp_path, format):
    wide = format.endswith("float16")
    native, graph = identity_net("Identity")
    plan = plan_of(graph, overrides={"y": Float("tested alone")})
    grid = encoding(QuantSpec(16 if wide else 8), 1.0 if wide else 0.3).with_(float_format=format)
    path = write_qdq(native, graph, plan, {"x": grid}, tmp_path / "m.onnx").path
    x = np.random.default_rng(0).normal(0, 200, (100, 4)).astype(np.float32)
    x[0] = [1e-6, -7e4, 65519, 1e30]
    np.testing.assert_array_equal(reference(path, {"x": x}), grid.fake_quantize(x))
    assert any(n.op_type == ("Cast" if wide else "QuantizeLinear") for n in onnx.load(path).graph.node)


def test_activation_per_channel(tmp_path):
    native, graph = identity_net("Identity")
    plan = plan_of(graph, overrides={"y": Float("no")})
    scale = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    grid = Encoding(8, False, False, scale, np.array([0, 10, 128, 255]), PerChannel(1))
    path = write_qdq(native, graph, plan, {"x": grid}, tmp_path / "m.onnx").path
    x = midpoints(0.1, (64, 4))
    np.testing.assert_array_equal(reference(path, {"x": x}), grid.fake_quantize(x))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(
    ("spec", "stored", "opset"),
    [
        (QuantSpec(8), "int8", 17),
        (QuantSpec(8, granularity=PerChannel(0)), "int8", 17),
        (QuantSpec(8, granularity=PerChannel(0), signed=False, symmetric=False), "uint8", 17),
        (QuantSpec(6, granularity=PerChannel(0)), "int8", 17),
        (QuantSpec(4, granularity=PerChannel(0)), "int4", 21),
        (QuantSpec(4, signed=False, symmetric=False), "uint4", 21),
        (QuantSpec(3, granularity=PerChannel(0)), "int4", 21),
        (QuantSpec(2, granularity=PerChannel(0)), "int4", 21),
        (QuantSpec(16, granularity=PerChannel(0)), "int16", 21),
        (QuantSpec(4, granularity=Blockwise(block_size=4)), "int4", 21),
        (QuantSpec(8, granularity=Blockwise(block_size=2)), "int8", 21),
        (QuantSpec(4, granularity=Blockwise(block_size=2, decompressed_bits=8)), "int4", 21),
        (QuantSpec(16, float_format="float16"), "float16", 17),
        (QuantSpec(16, float_format="bfloat16"), "bfloat16", 17),
        (QuantSpec(8, float_format="float8e4m3fn", granularity=PerChannel(0)), "float8_e4m3fn", 19),
    ],
    ids=str,
)
def test_weights_are_integers_in_native_layout(tmp_path, spec, stored, opset, transposed):
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (5, 8) if transposed else (8, 5)).astype(np.float32)
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], transB=transposed)
    native, graph = opened(proto([gemm], {"x": ["N", 8]}, ["y"], {"w": weight}))
    plan = plan_of(graph, weight=spec, overrides={"x": Float("no"), "y": Float("no")})
    canonical = read_params(native, ["w"])["w"]
    grid = encoding_of_weights(canonical, spec)
    path = write_qdq(native, graph, plan, {"w": grid}, tmp_path / "m.onnx").path
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == opset
    kept = initializers(path)
    assert kept["w_quantized"].dtype.name == stored
    assert "w" not in kept
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph.node) == 0
    got = reference(path, {"x": np.eye(8, dtype=np.float32)})
    np.testing.assert_array_equal(got, grid.fake_quantize(canonical).T)
    np.testing.assert_array_equal(native.graph.initializers["w"].const_value.numpy(), weight)


def test_blockwise_convolution(tmp_path):
    weight = np.random.default_rng(0).normal(0, 1, (4, 6, 3, 3)).astype(np.float32)
    native, graph = opened(
        proto([helper.make_node("Conv", ["x", "w"], ["y"])], {"x": ["N", 6, 3, 3]}, ["y"], {"w": weight})
    )
    spec = QuantSpec(4, granularity=Blockwise(block_size=3))
    plan = plan_of(graph, weight=spec, overrides={"x": Float("no"), "y": Float("no")})
    grid = encoding_of_weights(weight, spec)
    path = write_qdq(native, graph, plan, {"w": grid}, tmp_path / "m.onnx").path
    assert initializers(path)["w_scale"].shape == (4, 2, 3, 3)
    x = np.eye(54, dtype=np.float32).reshape(54, 6, 3, 3)
    got = reference(path, {"x": x}).reshape(54, 4)
    np.testing.assert_array_equal(got, grid.fake_quantize(weight).reshape(4, 54).T)


def test_every_quantized_site_has_exactly_one_pair(tmp_path):
    native, graph = conv_net()
    plan = plan_of(graph, overrides={"f": SharedWith("p")})
    batch = {"x": np.random.default_rng(3).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)}
    report = write_qdq(native, graph, plan, encodings_of(native, graph, plan, batch), tmp_path / "m.onnx")
    model = onnx.load(report.path)
    onnx.checker.check_model(model, full_check=True)
    assert not report.skipped
    for site in plan.quantized:
        expected = (
            ["DequantizeLinear", "QuantizeLinear"] if plan[site].kind is SiteKind.ACTIVATION else ["DequantizeLinear"]
        )
        assert pairs(model, site) == expected, site
        name = report.names.get(site, site)
        assert [n.op_type for n in model.graph.node if name in n.output] == ["DequantizeLinear"], site
    kinds = [n.op_type for n in model.graph.node]
    activations = sum(plan[s].kind is SiteKind.ACTIVATION for s in plan.quantized)
    assert kinds.count("QuantizeLinear") == activations
    assert kinds.count("DequantizeLinear") == len(plan.quantized)
    assert [o.name for o in model.graph.output] == ["y"]
    assert [i.name for i in model.graph.input] == ["x"]


def test_bias_scale_is_that_of_the_accumulator(tmp_path):
    native, graph = conv_net()
    plan = plan_of(graph)
    batch = {"x": np.random.default_rng(3).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)}
    encodings = encodings_of(native, graph, plan, batch)
    kept = initializers(write_qdq(native, graph, plan, encodings, tmp_path / "m.onnx").path)
    for bias, inputs, weight in (("b1", "x", "w1"), ("b2", "r1", "w2"), ("b3", "f", "w3")):
        scale = encodings[inputs].scale * encodings[weight].scale
        np.testing.assert_array_equal(kept[f"{bias}_scale"], scale)
        assert kept[f"{bias}_quantized"].dtype == np.int32
        assert not kept[f"{bias}_zero_point"].any()
        np.testing.assert_array_equal(kept[f"{bias}_quantized"], np.rint(read_params(native, [bias])[bias] / scale))


def test_a_bias_that_would_overflow_raises_its_channels_weight_scale(tmp_path):
    weight = np.random.default_rng(0).normal(0, 1, (3, 2, 1, 1)).astype(np.float32)
    weight[1] = 0  # a dead channel: its grid would be far too fine for the bias
    bias = np.array([0.5, 100.0, -0.5], np.float32)
    conv = helper.make_node("Conv", ["x", "w", "b"], ["y"])
    native, graph = opened(proto([conv], {"x": ["N", 2, 1, 1]}, ["y"], {"w": weight, "b": bias}))
    plan = plan_of(graph)
    encodings = {
        "x": encoding(ACTIVATION, 0.01),
        "y": encoding(ACTIVATION, 0.5),
        "w": encoding_of_weights(weight, QuantSpec(granularity=PerChannel(0))),
    }
    assert 100.0 / (0.01 * encodings["w"].scale[1]) > 2**30
    report = write_qdq(native, graph, plan, encodings, tmp_path / "m.onnx")
    assert report.raised == {"w": (1,)}
    kept = initializers(report.path)
    codes = kept["b_quantized"].astype(np.int64)
    # Half of the accumulator stays free for the products.
    assert (np.abs(codes) <= 2**30).all()
    assert abs(codes[1] * float(kept["b_scale"][1]) - 100) < 1e-3
    np.testing.assert_array_equal(kept["w_scale"][[0, 2]], encodings["w"].scale[[0, 2]])


def test_one_weight_for_two_ops_and_a_bias_on_two_scales(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(0, 1, (4, 4, 1, 1)), "b": rng.normal(0, 1, 4)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], name="first"),
        helper.make_node("Conv", ["h", "w", "b"], ["y"], name="second"),
    ]
    native, graph = opened(proto(nodes, {"x": ["N", 4, 3, 3]}, ["y"], weights))
    plan = plan_of(graph)
    batch = {"x": rng.normal(0, 1, (4, 4, 3, 3)).astype(np.float32)}
    encodings = encodings_of(native, graph, plan, batch)
    report = write_qdq(native, graph, plan, encodings, tmp_path / "m.onnx")
    model = onnx.load(report.path)
    assert pairs(model, "w") == ["DequantizeLinear"]
    assert pairs(model, "b") == ["DequantizeLinear"]
    readers = {n.name: list(n.input) for n in model.graph.node if n.op_type == "Conv"}
    assert readers["first"][1] == readers["second"][1] == "w"
    # An integer kernel assumes s_input·s_weight, so each op reads the bias on its own accumulator's grid.
    assert readers["first"][2] != readers["second"][2]
    kept = initializers(report.path)
    second = readers["second"][2]
    np.testing.assert_array_equal(kept[f"{second}_scale"], encodings["h"].scale * encodings["w"].scale)


def test_names_are_stable_and_clash_safe(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["x_quantized"]),
        helper.make_node("Neg", ["x_quantized"], ["y"]),
        helper.make_node("Add", ["y", "x_scale"], ["z"]),
    ]
    native, graph = opened(proto(nodes, {"x": ["N", 4]}, ["y", "z"], {"x_scale": np.ones(4)}))
    plan = plan_of(graph)
    grids = {s: encoding(ACTIVATION, 0.1, 9) for s in ("x", "x_quantized", "y", "z")}
    grids["x_scale"] = encoding_of_weights(np.ones(4, np.float32), QuantSpec(granularity=PerChannel(0)))
    first = write_qdq(native, graph, plan, grids, tmp_path / "a.onnx")
    again = write_qdq(native, graph, plan, grids, tmp_path / "b.onnx")
    assert first.path.read_bytes() == again.path.read_bytes()
    model = onnx.load(first.path)
    onnx.checker.check_model(model, full_check=True)
    assert [o.name for o in model.graph.output] == ["y", "z"]
    x = np.linspace(-2, 9, 8, dtype=np.float32).reshape(2, 4)
    q = grids["y"].fake_quantize
    np.testing.assert_array_equal(reference(first.path, {"x": x}, ["y"]), q(-q(np.maximum(q(x), 0))))


def test_inputs_that_are_outputs_and_readers_in_subgraphs(tmp_path):
    body = [
        helper.make_graph(
            [helper.make_node(op, ["r"], [f"{op}_y"])], op, [], [helper.make_tensor_value_info(f"{op}_y", 1, None)]
        )
        for op in ("Neg", "Abs")
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "limit"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=body[0], else_branch=body[1]),
    ]
    model = proto(nodes, {"x": [2, 3]}, ["y"], {"limit": np.float32(0)})
    model.graph.output.append(model.graph.input[0])
    native, graph = opened(model)
    plan = plan_of(graph, overrides={t: Float("no") for t in ("sum", "c", "y", "limit")})
    grid = encoding(ACTIVATION, 0.3, 3)
    path = write_qdq(native, graph, plan, {"x": grid, "r": grid}, tmp_path / "m.onnx").path
    written = onnx.load(path)
    onnx.checker.check_model(written)
    assert [o.name for o in written.graph.output] == ["y", "x"]
    x = np.linspace(-1, 5, 6, dtype=np.float32).reshape(2, 3)
    q = grid.fake_quantize
    np.testing.assert_array_equal(reference(path, {"x": x}), -q(np.maximum(q(x), 0)))
    np.testing.assert_array_equal(reference(path, {"x": x}, ["x"]), x)


def test_what_onnx_cannot_say_is_refused_before_writing(tmp_path):
    native, graph = identity_net("Identity")
    plan = plan_of(graph, overrides={"y": Float("no")})
    with pytest.raises(EncodingError, match=r"'x'.*32-bit"):
        write_qdq(native, graph, plan, {"x": encoding(QuantSpec(32), 0.1)}, tmp_path / "m.onnx")
    blocks = Encoding(8, True, True, np.ones((4, 1)), np.zeros((4, 1)), Blockwise(1, 0, 2))
    with pytest.raises(EncodingError, match=r"'x'.*blockwise"):
        write_qdq(native, graph, plan, {"x": blocks}, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError):
        write_qdq(native, graph, plan, {"x": encoding(ACTIVATION, 0.1)}, tmp_path / "nowhere" / "m.onnx")


def test_sites_without_an_encoding_are_reported(tmp_path):
    native, graph = identity_net()
    plan = plan_of(graph)
    report = write_qdq(native, graph, plan, {"x": encoding(ACTIVATION, 0.1)}, tmp_path / "m.onnx")
    assert report.skipped == {"y": "it has no encoding"}
    bundle = report.bundle()
    assert bundle.files == {"qdq": tmp_path / "m.onnx"}
    assert bundle.names == {"x": "x_dequantized"}
