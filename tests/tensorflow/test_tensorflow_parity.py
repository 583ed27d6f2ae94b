"""The same network opened by TensorFlow and by ONNX: equal plans, equal bits of weights, equal techniques."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from parity import assert_close_outputs, assert_close_params, assert_equal_plans, matched_names  # noqa: E402

from bitwright.graph import OpKind  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402

EPSILON = 1e-3
v1 = tf.compat.v1
QUANTIZED = 1e-4
"""For what is measured in the simulated network. Codes of weights and activations are the same there; the scales of
activations differ by the last bits of float sums, and biases are differences of means of such values: 5e-6 at the last
layer, one unit in the last place of its inputs of 12, is 2e-5 of its largest bias. A value at the edge of a code could
move a mean further."""
DATA = np.random.default_rng(2).standard_normal((24, 6, 6, 3)).astype(np.float32)


def weights() -> dict[str, np.ndarray]:
    """Canonical layout."""
    rng = np.random.default_rng(0)
    shapes = {"conv1": (8, 3, 3, 3), "conv2": (8, 1, 3, 3), "conv3": (6, 8, 1, 1), "fc": (5, 6)}
    values = {f"{n}/kernel": rng.normal(0, 0.5, s) for n, s in shapes.items()}
    values["fc/bias"] = rng.normal(0, 0.2, 5)
    for i, n in ((1, 8), (2, 8), (3, 6)):
        values |= {f"bn{i}/gamma": rng.uniform(0.4, 1.4, n), f"bn{i}/beta": rng.uniform(-0.5, 0.5, n),
                   f"bn{i}/mean": rng.uniform(-0.5, 0.5, n), f"bn{i}/var": rng.uniform(0.05, 1.05, n)}  # fmt: skip
    return {k: v.astype(np.float32) for k, v in values.items()}


def in_session(w: dict[str, np.ndarray]) -> SessionModel:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 6, 6, 3), name="x")
        y = x
        orders = {"conv1/kernel": (2, 3, 1, 0), "conv2/kernel": (2, 3, 0, 1), "conv3/kernel": (2, 3, 1, 0),
                  "fc/kernel": (1, 0)}  # fmt: skip
        v = {
            k: v1.get_variable(k, initializer=a.transpose(orders.get(k, range(a.ndim))), use_resource=True)
            for k, a in w.items()
        }
        for i in (1, 2, 3):
            run = tf.nn.depthwise_conv2d if i == 2 else tf.nn.conv2d
            y = run(y, v[f"conv{i}/kernel"], [1, 1, 1, 1], "SAME", name=f"conv{i}/Conv2D")
            norm = [v[f"bn{i}/{n}"] for n in ("gamma", "beta", "mean", "var")]
            if i == 3:  # as arithmetic
                y = tf.nn.batch_normalization(y, norm[2], norm[3], norm[1], norm[0], EPSILON, name=f"bn{i}")
            else:
                y = v1.nn.fused_batch_norm(y, *norm, EPSILON, is_training=False, name=f"bn{i}")[0]
            y = tf.nn.relu(y, name=f"relu{i}")
        y = tf.reduce_mean(y, [1, 2], name="pool")
        y = tf.nn.bias_add(tf.matmul(y, v["fc/kernel"], name="fc/MatMul"), v["fc/bias"], name="fc/BiasAdd")
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    return SessionModel(session, inputs=[x], outputs=[y])


def as_onnx(w: dict[str, np.ndarray]) -> onnx.ModelProto:
    nodes, last = [], "x"
    for i, groups in ((1, 1), (2, 8), (3, 1)):
        norm = [f"bn{i}/{name}" for name in ("gamma", "beta", "mean", "var")]
        pads = [1] * 4 if i < 3 else [0] * 4
        nodes += [
            helper.make_node("Conv", [last, f"conv{i}/kernel"], [f"c{i}"], f"conv{i}", pads=pads, group=groups),
            helper.make_node("BatchNormalization", [f"c{i}", *norm], [f"b{i}"], f"bn{i}", epsilon=EPSILON),
            helper.make_node("Relu", [f"b{i}"], [f"r{i}"], f"relu{i}"),
        ]
        last = f"r{i}"
    nodes += [
        helper.make_node("ReduceMean", [last], ["flat"], "pool", axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["flat", "fc/kernel", "fc/bias"], ["y"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(v, k) for k, v in w.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def opened(tmp_path: Path, *, fold: bool = True, **options: object) -> tuple[QuantSim, QuantSim, dict[str, str]]:
    """Both, batch norms folded, and the second's name of each site of the first."""
    w = weights()
    onnx.save(as_onnx(w), tmp_path / "net.onnx")
    a, b = QuantSim(in_session(w), **options), QuantSim(tmp_path / "net.onnx", **options)
    norms = [[op.attrs.epsilon for op in sim.graph.ops if op.kind is OpKind.BATCH_NORM] for sim in (a, b)]
    assert norms[0] == norms[1]
    assert len(norms[0]) == 3
    if fold:
        a.apply("fold_batch_norm")
        b.apply("fold_batch_norm")
    return a, b, matched_names(a, b, lambda x, y: (x.kind, x.type) == (y.kind, y.type))


@pytest.mark.parametrize("target", ["default", "htp_v73", "per_tensor"])
@pytest.mark.parametrize("fold", [True, False])
def test_plans_are_equal(tmp_path: Path, target: str, fold: bool) -> None:
    a, b, names = opened(tmp_path, fold=fold, target=target)
    assert_equal_plans(a, b, names, lambda d: (type(d), getattr(d, "spec", None)))


@pytest.mark.parametrize(
    ("options", "steps", "tolerance"),
    [
        ({}, (), 1e-5),
        ({"target": "per_tensor"}, ("cross_layer_equalization",), 1e-5),
        ({"target": "per_tensor"}, ("cross_layer_equalization", "bias_correction"), 1e-5),
        ({"weights": "int4"}, ("seq_mse",), 1e-5),
        ({"weights": "int4"}, ("adaround",), QUANTIZED),
        ({"weights": "int4"}, ("gptq",), QUANTIZED),
    ],
    ids=["folded", "equalized", "corrected", "seq_mse", "adaround", "gptq"],
)
def test_techniques_give_equal_numbers(tmp_path: Path, options: dict, steps: tuple[str, ...], tolerance: float) -> None:
    a, b, names = opened(tmp_path, scheme="minmax", **options)
    agree(a, b, names, steps, tolerance)


def test_batch_norm_techniques_give_equal_numbers(tmp_path: Path) -> None:
    a, b, names = opened(tmp_path, fold=False, scheme="minmax")
    for sim, data in ((a, DATA), (b, DATA.transpose(0, 3, 1, 2))):
        sim.calibrate(data)
    agree(a, b, names, ("batch_norm_reestimation",), QUANTIZED)
    for sim in (a, b):
        sim.apply("fold_batch_norm_to_scale")
    assert len(a.graph.ops) == len(b.graph.ops) == 8
    same_encodings(a, b, {s: names[s] for s in (*a.plan.activations, *a.plan.parameters) if s in names}, QUANTIZED)


def agree(a: QuantSim, b: QuantSim, names: dict[str, str], steps: tuple[str, ...], tolerance: float = 1e-5) -> None:
    nchw = np.ascontiguousarray(DATA.transpose(0, 3, 1, 2))
    for sim, data in ((a, DATA), (b, nchw)):
        for step in steps:
            sim.apply(step, data)
        sim.calibrate(data)
    assert_close_params(a, b, names, tolerance)
    same_encodings(a, b, names, tolerance)
    assert_close_outputs(a, b, DATA, nchw)


def same_encodings(a: QuantSim, b: QuantSim, names: dict[str, str], tolerance: float = 1e-5) -> None:
    compared = [site for site in names if site in a.encodings]
    assert compared
    for site in compared:
        x, y = a.encodings[site], b.encodings[names[site]]
        np.testing.assert_allclose(x.scale, y.scale, rtol=tolerance)
        np.testing.assert_array_equal(x.zero_point, y.zero_point)


def test_weight_encodings_are_equal_to_the_bit(tmp_path: Path) -> None:
    a, b, names = opened(tmp_path, scheme="minmax")
    a.calibrate(DATA)
    b.calibrate(np.ascontiguousarray(DATA.transpose(0, 3, 1, 2)))
    weights = [s for s in a.plan.parameters if s.endswith("kernel")]
    assert len(weights) == 4
    for site in weights:
        np.testing.assert_array_equal(a.params[site], b.params[names[site]])
        assert a.encodings[site].equals(b.encodings[names[site]])
