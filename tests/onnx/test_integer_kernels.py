"""The core's integer kernels against ONNX Runtime's, bit for bit."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitwright.graph import ConvAttrs, Op, OpKind, PoolAttrs
from bitwright.grids import Encoding, Grid, PerChannel
from bitwright.verify import _integer_kernels as kernels

F = np.float32


def run(nodes, constants, inputs):
    kinds = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.int8): TensorProto.INT8}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(k, kinds[v.dtype], v.shape) for k, v in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Without VNNI, signed weights saturate in 16 bits unless the runtime is told to be precise.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0].astype(np.int64)


def uint8(scale, zero):
    return Encoding(8, False, False, F(scale), np.int32(zero))


def drawn(rng):
    return uint8(rng.uniform(0.01, 0.1), rng.integers(0, 256))


def operands(*pairs):
    flat = {}
    for name, encoding in pairs:
        flat[f"s{name}"] = encoding.scale
        flat[f"z{name}"] = np.asarray(encoding.zero_point, np.uint8)
    return flat


PAIRS = [v.astype(np.uint8) for v in np.meshgrid(np.arange(256), np.arange(256))]


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(("type", "kernel"), [("QLinearAdd", kernels.add), ("QLinearMul", kernels.multiply)])
def test_elementwise_equals_the_runtime_on_all_pairs_of_codes(type, kernel, seed):
    rng = np.random.default_rng(seed)
    a, b, y = (drawn(rng) for _ in range(3))
    node = helper.make_node(type, ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], ["y"], domain="com.microsoft")
    expected = run([node], operands(("a", a), ("b", b), ("y", y)), {"a": PAIRS[0], "b": PAIRS[1]})
    ours = kernel(PAIRS[0].astype(np.int32), a, PAIRS[1].astype(np.int32), b, y, 0, 255)
    assert np.array_equal(ours, expected)


def test_a_product_adds_the_zero_point_before_it_is_rounded():
    """2.5 + 3 and 3.5 + 3 round to even: 2.5 by itself would give 2 + 3."""
    a, y = uint8(0.5, 0), uint8(1.0, 3)
    node = helper.make_node("QLinearMul", ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], ["y"], domain="com.microsoft")
    x, one = np.arange(8, dtype=np.uint8), np.array([1], np.uint8)
    b = uint8(1.0, 0)
    expected = run([node], operands(("a", a), ("b", b), ("y", y)), {"a": x, "b": one})
    assert expected.tolist() == [3, 4, 4, 4, 5, 6, 6, 6]
    assert np.array_equal(kernels.multiply(x.astype(np.int32), a, one.astype(np.int32), b, y, 0, 255), expected)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "shapes",
    [((2, 64, 7, 7), (2, 64, 1, 1)), ((2, 1, 7, 7), (2, 48, 7, 7)), ((2, 7, 7, 64), (64,)), ((300, 17), ()),
     ((64, 1), (1, 257)), ((3, 5, 9), (5, 1))],
)  # fmt: skip
@pytest.mark.parametrize(("type", "kernel"), [("QLinearAdd", kernels.add), ("QLinearMul", kernels.multiply)])
def test_elementwise_equals_the_runtime_where_it_broadcasts(type, kernel, shapes, seed):
    rng = np.random.default_rng(seed)
    a, b, y = (drawn(rng) for _ in range(3))
    first, second = (rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes)
    node = helper.make_node(type, ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], ["y"], domain="com.microsoft")
    expected = run([node], operands(("a", a), ("b", b), ("y", y)), {"a": first, "b": second})
    ours = kernel(first.astype(np.int32), a, second.astype(np.int32), b, y, 0, 255)
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("seed", range(5))
def test_global_average_pool_equals_the_runtime(seed):
    rng = np.random.default_rng(seed)
    a, y = drawn(rng), drawn(rng)
    x = rng.integers(0, 256, (2, 48, 7, 7)).astype(np.uint8)
    node = helper.make_node(
        "QLinearGlobalAveragePool", ["a", "sa", "za", "sy", "zy"], ["y"], domain="com.microsoft", channels_last=0
    )
    expected = run([node], operands(("a", a), ("y", y)), {"a": x})
    ours = kernels.average_pool(x.astype(np.int32), a, PoolAttrs(axes=(2, 3)), y, Grid(0, 255))
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("window", [2, 3])
def test_average_pool_equals_the_runtime(seed, include, same, window):
    """On one grid for both, which most targets ask for, every fourth average of four lies between two codes."""
    rng = np.random.default_rng(seed)
    a = drawn(rng)
    y = a if same else drawn(rng)
    x = rng.integers(0, 256, (2, 16, 20, 20)).astype(np.uint8)
    pads = ((1, 1), (1, 1)) if include else ((0, 0), (0, 0))
    node = helper.make_node(
        "QLinearAveragePool", ["a", "sa", "za", "sy", "zy"], ["y"], domain="com.microsoft", channels_last=0,
        kernel_shape=[window] * 2, strides=[2, 2], pads=[p[i] for i in (0, 1) for p in pads],
        count_include_pad=int(include),
    )  # fmt: skip
    expected = run([node], operands(("a", a), ("y", y)), {"a": x})
    attrs = PoolAttrs(window=ConvAttrs((window, window), (2, 2), (1, 1), pads), count_include_pad=include)
    ours = kernels.average_pool(x.astype(np.int32), a, attrs, y, Grid(0, 255))
    assert np.array_equal(ours, expected)
    last = kernels.average_pool(np.moveaxis(x, 1, 3).astype(np.int32), a, attrs, y, Grid(0, 255), channel_axis=3)
    assert np.array_equal(np.moveaxis(last, 3, 1), expected)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("classes", [2, 7, 100, 1500])
def test_softmax_equals_the_runtime(seed, classes):
    rng = np.random.default_rng(seed)
    a, y = uint8(rng.uniform(0.01, 0.15), rng.integers(0, 256)), uint8(rng.choice([1 / 256, 1 / 255, 0.003]), 0)
    x = rng.integers(0, 256, (200, classes)).astype(np.uint8)
    node = helper.make_node(
        "QLinearSoftmax", ["a", "sa", "za", "sy", "zy"], ["y"], domain="com.microsoft", axis=-1, opset=13
    )
    expected = run([node], operands(("a", a), ("y", y)), {"a": x})
    steps = np.abs(kernels.softmax(x.astype(np.int32), a, -1, y) - expected)
    assert steps.max() <= 1
    assert (steps > 0).mean() <= 1e-3


CONVS = {
    "pointwise": (64, 32, 1, 1, 1, (0, 0)),
    "three": (16, 24, 3, 1, 1, (1, 1)),
    "strided, asymmetric pads": (8, 12, 3, 2, 1, (0, 1)),
    "depthwise": (32, 32, 5, 1, 32, (2, 2)),
    "grouped": (16, 32, 3, 1, 4, (1, 1)),
    "deep": (512, 8, 3, 1, 1, (1, 1)),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_convolution_equals_the_runtime(name, per_channel):
    cin, cout, kernel, stride, groups, pad = CONVS[name]
    rng = np.random.default_rng(3)
    a, y = uint8(0.03, 117), uint8(0.6, 90)
    x = rng.integers(0, 256, (2, cin, 9, 9)).astype(np.uint8)
    w = rng.integers(-128, 128, (cout, cin // groups, kernel, kernel)).astype(np.int8)
    bias = rng.integers(-5000, 5000, cout).astype(np.int32)
    scale = rng.uniform(0.001, 0.01, cout if per_channel else ()).astype(F)
    node = helper.make_node(
        "QLinearConv", ["a", "sa", "za", "w", "sw", "zw", "sy", "zy", "b"], ["y"], kernel_shape=[kernel, kernel],
        strides=[stride, stride], group=groups, pads=[pad[0], pad[0], pad[1], pad[1]],
    )  # fmt: skip
    constants = {**operands(("a", a), ("y", y)), "w": w, "sw": scale, "zw": np.zeros(scale.shape, np.int8), "b": bias}
    expected = run([node], constants, {"a": x})
    attrs = ConvAttrs((kernel, kernel), (stride, stride), (1, 1), (pad, pad), groups)
    op = Op("conv", OpKind.CONV, "Conv", ("a",), ("y",), attrs=attrs)
    total = kernels.accumulate(op, x.astype(np.int32), a, w.astype(np.int32), 1)
    total = total + bias.reshape(1, -1, 1, 1)
    multiplier = kernels.along(np.asarray(a.scale * scale, F), 4, 1)
    assert np.array_equal(kernels.requantize(total, multiplier, y, 0, 255), expected)


def test_accumulators_are_exact_beyond_float32():
    op = Op("fc", OpKind.LINEAR, "Gemm", ("a",), ("y",))
    codes = np.full((1, 4096), 255, np.int32)
    weight = np.full((1, 4096), 127, np.int32)
    weight[0, ::2] = 126
    total = kernels.accumulate(op, codes, uint8(1, 0), weight, None)
    assert total.item() == 255 * int(weight.sum()) > 2**24
    # The sum is small; sums on the way, of which a vectorized product has dozens, aren't.
    codes, weight = np.full((1, 2**19), 255, np.int32), np.where(np.arange(2**19) < 2**18, 127, -127)[None]
    weight[0, :5] = 101
    total = kernels.accumulate(op, codes, uint8(1, 0), weight.astype(np.int32), None)
    assert total.item() == 255 * int(weight.sum()) == -255 * 130


def test_features_of_linear_ops_lie_last():
    """Whichever axis the network's channels are on: of what mixes tokens, another."""
    rng = np.random.default_rng(0)
    op = Op("fc", OpKind.LINEAR, "MatMul", ("a",), ("y",))
    codes = rng.integers(0, 256, (2, 5, 8)).astype(np.int32)
    weight = rng.integers(-8, 8, (3, 8)).astype(np.int32)
    for axis in (None, -1, 1):
        assert np.array_equal(kernels.accumulate(op, codes, uint8(1, 0), weight, axis), codes @ weight.T)


def test_per_channel_values_broadcast_along_their_axis():
    assert kernels.along(np.arange(3), 4, 1).shape == (1, 3, 1, 1)
    assert kernels.along(np.arange(3), 3, -1).shape == (1, 1, 3)
    assert PerChannel(0) == PerChannel()
