"""Small models for the tests of the analysis tools."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

CLASSES, FEATURES, WIDTH, LAYERS = 6, 16, 32, 4


def blobs(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes that no linear model tells apart: two clusters each."""
    centres = np.random.default_rng(7).normal(size=(2 * CLASSES, FEATURES))
    rng = np.random.default_rng(seed)
    which = rng.integers(0, 2 * CLASSES, samples)
    x = centres[which] + rng.normal(scale=0.45, size=(samples, FEATURES))
    return x.astype(np.float32), which % CLASSES


def train(steps: int = 300) -> list[tuple[np.ndarray, np.ndarray]]:
    """An MLP by Adam and cross-entropy, in numpy: weights (out, in) and biases."""
    rng = np.random.default_rng(0)
    sizes = [FEATURES, *([WIDTH] * (LAYERS - 1)), CLASSES]
    params = [p for a, b in itertools.pairwise(sizes) for p in (rng.normal(0, np.sqrt(2 / a), (b, a)), np.zeros(b))]
    first, second = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    x, y = blobs(1500, 1)
    for t in range(1, steps + 1):
        batch = rng.integers(0, len(x), 128)
        held = [x[batch].astype(np.float64)]
        for i in range(LAYERS):
            z = held[-1] @ params[2 * i].T + params[2 * i + 1]
            held.append(np.maximum(z, 0) if i < LAYERS - 1 else z)
        p = np.exp(held[-1] - held[-1].max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(batch)), y[batch]] -= 1
        grads, g = [], p / len(batch)
        for i in reversed(range(LAYERS)):
            grads = [g.T @ held[i], g.sum(0), *grads]
            g = (g @ params[2 * i]) * (held[i] > 0)
        for k, grad in enumerate(grads):
            first[k] = 0.9 * first[k] + 0.1 * grad
            second[k] = 0.99 * second[k] + 0.01 * grad**2
            params[k] -= 0.01 * (first[k] / (1 - 0.9**t)) / (np.sqrt(second[k] / (1 - 0.99**t)) + 1e-8)
    return [(params[2 * i], params[2 * i + 1]) for i in range(LAYERS)]


def mlp(layers: list[tuple[np.ndarray, np.ndarray]]) -> onnx.ModelProto:
    nodes, weights, x = [], [], "features"
    for i, (w, b) in enumerate(layers, 1):
        weights += [
            onnx.numpy_helper.from_array(v.astype(np.float32), f"fc{i}.{n}") for n, v in (("weight", w), ("bias", b))
        ]
        last = i == len(layers)
        y = "scores" if last else f"fc{i}.out"
        nodes.append(onnx.helper.make_node("Gemm", [x, f"fc{i}.weight", f"fc{i}.bias"], [y], f"fc{i}", transB=1))
        if not last:
            nodes.append(onnx.helper.make_node("Relu", [y], [f"relu{i}.out"], f"relu{i}"))
            x = f"relu{i}.out"
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "mlp", [info("features", 1, ["n", FEATURES])], [info("scores", 1, ["n", CLASSES])], weights
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)


def conv_model(spread: float = 0.02) -> onnx.ModelProto:
    """Conv + batch norm + ReLU6, a depthwise convolution, a residual addition, pooling and a classifier.

    `spread`: the narrowest depthwise channel's range over the widest one's; most are narrow.
    """
    rng = np.random.default_rng(1)
    node, tensor = onnx.helper.make_node, lambda n, v: onnx.numpy_helper.from_array(np.asarray(v, np.float32), n)
    weights = {
        "conv.weight": rng.normal(0, 0.4, (8, 3, 3, 3)),
        "bn.gamma": rng.uniform(0.5, 1.5, 8),
        "bn.beta": rng.normal(size=8),
        "bn.mean": rng.normal(size=8),
        "bn.var": rng.uniform(0.5, 2, 8),
        "low": 0.0,
        "high": 6.0,
        "dw.weight": rng.normal(0, 0.4, (8, 1, 3, 3)) * np.where(np.arange(8) < 7, spread, 1.0)[:, None, None, None],
        "dw.bias": rng.normal(0, 0.4, 8),
        "fc.weight": rng.normal(0, 1, (5, 8)),
        "fc.bias": rng.normal(size=5),
    }
    nodes = [
        node("Conv", ["image", "conv.weight"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["conv", "bn.gamma", "bn.beta", "bn.mean", "bn.var"], ["bn"], "bn"),
        node("Clip", ["bn", "low", "high"], ["clip"], "clip"),
        node("Conv", ["clip", "dw.weight", "dw.bias"], ["dw"], "dw", group=8, pads=[1, 1, 1, 1]),
        node("Add", ["dw", "clip"], ["sum"], "add"),
        node("GlobalAveragePool", ["sum"], ["pool"], "pool"),
        node("Flatten", ["pool"], ["flat"], "flat"),
        node("Gemm", ["flat", "fc.weight", "fc.bias"], ["scores"], "fc", transB=1),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [info("image", 1, ["n", 3, 12, 12])],
        [info("scores", 1, ["n", 5])],
        [tensor(n, v) for n, v in weights.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
