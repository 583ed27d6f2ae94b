"""The same network opened by Keras and by ONNX: equal plans, equal bits after folding, equal techniques."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
onnx = pytest.importorskip("onnx")

from keras import layers as L  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from parity import assert_close_outputs, assert_close_params, assert_equal_plans, matched_names  # noqa: E402

from bitwright.placement import SiteKind  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402

EPSILON = 1e-3


def network() -> keras.Model:
    """Activations as arguments and as layers, strided "same" padding, a separable convolution."""
    x = inputs = keras.Input((7, 7, 3), name="x")
    x = L.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="conv1")(x)
    x = L.ReLU(name="relu1")(L.BatchNormalization(epsilon=EPSILON, name="bn1")(x))
    x = L.SeparableConv2D(8, 3, padding="same", use_bias=False, name="sep")(x)
    x = L.ReLU(6.0, name="relu2")(L.BatchNormalization(epsilon=EPSILON, name="bn2")(x))
    x = L.Conv2D(6, 1, activation="relu", name="conv3")(x)
    x = L.GlobalAveragePooling2D(name="pool")(x)
    net = keras.Model(inputs, L.Dense(5, name="fc")(x))
    rng = np.random.default_rng(1)
    for layer in net.layers:
        for variable in layer.variables:
            low = 0.05 if "variance" in variable.name else 0.4 if "gamma" in variable.name else -0.5
            variable.assign(rng.uniform(low, low + 1, variable.shape))
    return net


def as_onnx(net: keras.Model) -> onnx.ModelProto:
    values: dict[str, np.ndarray] = {}
    for layer in net.layers:
        for variable in layer.variables:
            value = variable.numpy()
            if value.ndim == 4:
                order = (2, 3, 0, 1) if "depthwise" in variable.name else (3, 2, 0, 1)
                value = value.transpose(order)
            values[f"{layer.name}/{variable.name}"] = np.ascontiguousarray(value)

    def norm(i: int, x: str) -> onnx.NodeProto:
        names = [f"bn{i}/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")]
        return helper.make_node("BatchNormalization", [x, *names], [f"b{i}"], f"bn{i}", epsilon=EPSILON)

    constants = {"low": np.float32(0), "six": np.float32(6), "axes": np.array([2, 3], np.int64)}
    nodes = [
        helper.make_node("Conv", ["x", "conv1/kernel"], ["c1"], "conv1", strides=[2, 2], auto_pad="SAME_UPPER"),
        norm(1, "c1"),
        helper.make_node("Relu", ["b1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "sep/depthwise_kernel"], ["d"], "depthwise", pads=[1] * 4, group=8),
        helper.make_node("Conv", ["d", "sep/pointwise_kernel"], ["p"], "sep"),
        norm(2, "p"),
        helper.make_node("Clip", ["b2", "low", "six"], ["r2"], "relu2"),
        helper.make_node("Conv", ["r2", "conv3/kernel", "conv3/bias"], ["c3"], "conv3"),
        helper.make_node("Relu", ["c3"], ["r3"], "relu3"),
        helper.make_node("ReduceMean", ["r3", "axes"], ["mean"], "pool", keepdims=0),
        helper.make_node("Gemm", ["mean", "fc/kernel", "fc/bias"], ["y"], "fc"),
    ]
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 7, 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(v, k) for k, v in {**values, **constants}.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


DATA = np.random.default_rng(2).standard_normal((24, 7, 7, 3)).astype(np.float32)
CHANNELS_FIRST = np.ascontiguousarray(DATA.transpose(0, 3, 1, 2))


def opened(tmp_path: Path, **options: object) -> tuple[QuantSim, QuantSim, dict[str, str]]:
    """Both, batch norms folded, and the second's name of each site of the first."""
    net = network()
    onnx.save(as_onnx(net), tmp_path / "net.onnx")
    a, b = QuantSim(net, **options), QuantSim(tmp_path / "net.onnx", **options)
    a.apply("fold_batch_norm")
    b.apply("fold_batch_norm")
    return a, b, names_of(a, b)


def names_of(a: QuantSim, b: QuantSim) -> dict[str, str]:
    return matched_names(
        a, b, lambda x, y: (x.kind, x.type, x.attrs) == (y.kind, y.type, y.attrs) or x.type == "ReduceMean"
    )


def test_plans_are_equal(tmp_path: Path) -> None:
    a, b, names = opened(tmp_path)
    assert {"sep/depthwise_kernel", "sep/pointwise_kernel"} <= set(a.plan)
    assert_equal_plans(a, b, names)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, ()),
        ({"target": "per_tensor"}, ("cross_layer_equalization", "bias_correction")),
        ({"weights": "int4"}, ("seq_mse",)),
        ({"weights": "int4"}, ("adaround",)),
    ],
    ids=["folded", "corrected", "seq_mse", "adaround"],
)
def test_techniques_give_equal_numbers(tmp_path: Path, options: dict, steps: tuple[str, ...]) -> None:
    a, b, _ = opened(tmp_path, scheme="minmax", **options)
    for sim, data in ((a, DATA), (b, CHANNELS_FIRST)):
        for step in steps:
            sim.apply(step, data)
        sim.calibrate(data)
    names = names_of(a, b)
    assert_close_params(a, b, names)
    for site in (*a.plan.activations, *a.plan.parameters):
        x, y = a.encodings[site], b.encodings[names[site]]
        if a.plan[site].kind is SiteKind.PARAMETER and not steps:
            assert x.equals(y)
        np.testing.assert_allclose(x.scale, y.scale, rtol=1e-5)
    assert_close_outputs(a, b, DATA, CHANNELS_FIRST, exact=1e-6)
