from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

CLASSES, SAMPLES = 5, 48


def build_model() -> onnx.ModelProto:
    """Conv + batch norm + ReLU6, a depthwise convolution, pooling and a classifier; the batch size is free."""
    rng = np.random.default_rng(1)

    def tensor(name, values):
        return onnx.numpy_helper.from_array(np.asarray(values, np.float32), name)

    def normal(*shape, scale=0.4):
        return rng.normal(scale=scale, size=shape)

    weights = [
        tensor("conv.weight", normal(8, 3, 3, 3)),
        tensor("bn.gamma", rng.uniform(0.5, 1.5, 8)), tensor("bn.beta", normal(8)),
        tensor("bn.mean", normal(8)), tensor("bn.var", rng.uniform(0.5, 2, 8)),
        tensor("low", 0.0), tensor("high", 6.0),
        tensor("dw.weight", normal(8, 1, 3, 3)), tensor("dw.bias", normal(8)),
        tensor("fc.weight", normal(CLASSES, 8, scale=1.0)), tensor("fc.bias", normal(CLASSES)),
    ]  # fmt: skip
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["image", "conv.weight"], ["conv"], "conv", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["conv", "bn.gamma", "bn.beta", "bn.mean", "bn.var"], ["bn"], "bn"),
        node("Clip", ["bn", "low", "high"], ["clip"], "clip"),
        node("Conv", ["clip", "dw.weight", "dw.bias"], ["dw"], "dw", group=8, strides=[2, 2]),
        node("Relu", ["dw"], ["relu"], "relu"),
        node("GlobalAveragePool", ["relu"], ["pool"], "pool"),
        node("Flatten", ["pool"], ["flat"], "flat"),
        node("Gemm", ["flat", "fc.weight", "fc.bias"], ["scores"], "fc", transB=1),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [info("image", onnx.TensorProto.FLOAT, ["n", 3, 12, 12])],
        [info("scores", onnx.TensorProto.FLOAT, ["n", CLASSES])],
        weights,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session")
def net(tmp_path_factory) -> SimpleNamespace:
    """A model file, samples as .npz and .npy, and labels that the float model gets right."""
    import onnxruntime

    folder: Path = tmp_path_factory.mktemp("net")
    model = folder / "net.onnx"
    model.write_bytes(build_model().SerializeToString())
    images = np.random.default_rng(2).normal(size=(SAMPLES, 3, 12, 12)).astype(np.float32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    labels = session.run(None, {"image": images})[0].argmax(axis=1)
    np.savez(folder / "data.npz", image=images)
    np.save(folder / "data.npy", images)
    np.save(folder / "labels.npy", labels)
    return SimpleNamespace(
        folder=folder, model=model, npz=folder / "data.npz", npy=folder / "data.npy", labels=folder / "labels.npy",
        images=images,
    )  # fmt: skip


@pytest.fixture(scope="session")
def exported(net) -> Path:
    """A finished export with every file."""
    from bitwright.cli import main

    out = net.folder / "exported"
    words = ["quantize", net.model, "--data", net.npz, "--labels", net.labels, "--recipe", "bn_fold,cle",
             "--out", out, "--target", "onnxruntime-cpu", "--quiet"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    return out
