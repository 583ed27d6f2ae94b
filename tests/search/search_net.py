"""A small ONNX classifier whose channels have very different ranges, with data and the labels that it gives them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

CLASSES = 5


def build(spread: float = 1.5, seed: int = 1, *, size: int | str = 12, shift=0.0) -> onnx.ModelProto:
    """Conv + batch norm + ReLU, depthwise conv + ReLU, a residual addition, pooling and a classifier.

    `spread` is the standard deviation of the channels' log scales; they cancel between layers. `shift` is taken from
    the scores.
    """
    rng = np.random.default_rng(seed)
    s, t = (np.exp(rng.normal(0, spread, 8)) for _ in range(2))
    column = (slice(None), None, None, None)
    arrays = {
        "stem.weight": rng.normal(0, 0.4, (8, 3, 3, 3)) * s[column],
        "bn.gamma": np.ones(8), "bn.beta": rng.normal(0, 0.2, 8) * s, "bn.mean": rng.normal(0, 0.2, 8) * s,
        "bn.var": np.ones(8),
        "dw.weight": rng.normal(0, 0.4, (8, 1, 3, 3)) * (t / s)[column], "dw.bias": rng.normal(0, 0.1, 8) * t,
        "mix.weight": rng.normal(0, 0.4, (8, 8, 1, 1)) / t[None, :, None, None], "mix.bias": rng.normal(0, 0.1, 8),
        "res.weight": rng.normal(0, 0.3, (8, 8, 3, 3)), "res.bias": rng.normal(0, 0.1, 8),
        "fc.weight": rng.normal(0, 1.0, (CLASSES, 8)), "fc.bias": rng.normal(0, 0.1, CLASSES) - shift,
    }  # fmt: skip
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["image", "stem.weight"], ["stem_out"], "stem", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["stem_out", "bn.gamma", "bn.beta", "bn.mean", "bn.var"], ["bn_out"], "bn"),
        node("Relu", ["bn_out"], ["relu1_out"], "relu1"),
        node("Conv", ["relu1_out", "dw.weight", "dw.bias"], ["dw_out"], "dw", group=8, strides=[2, 2]),
        node("Relu", ["dw_out"], ["relu2_out"], "relu2"),
        node("Conv", ["relu2_out", "mix.weight", "mix.bias"], ["mix_out"], "mix"),
        node("Conv", ["mix_out", "res.weight", "res.bias"], ["res_out"], "res", pads=[1, 1, 1, 1]),
        node("Add", ["mix_out", "res_out"], ["add_out"], "add"),
        node("GlobalAveragePool", ["add_out"], ["pool_out"], "pool"),
        node("Flatten", ["pool_out"], ["flat_out"], "flat"),
        node("Gemm", ["flat_out", "fc.weight", "fc.bias"], ["scores"], "fc", transB=1),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [info("image", onnx.TensorProto.FLOAT, ["n", 3, size, size])],
        [info("scores", onnx.TensorProto.FLOAT, ["n", CLASSES])],
        [onnx.numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in arrays.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def write(folder: Path, samples: int = 64) -> SimpleNamespace:
    """Model file, images and labels, in memory and as files. Mean scores are zero, so that all classes come."""
    model = folder / "net.onnx"
    images = np.random.default_rng(2).normal(size=(samples, 3, 12, 12)).astype(np.float32)

    def scores(shift):
        model.write_bytes(build(shift=shift).SerializeToString())
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return session.run(None, {"image": images})[0]

    exact = scores(scores(0.0).mean(axis=0))
    labels = exact.argmax(axis=1)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "exact.npy", exact)
    return SimpleNamespace(
        folder=folder, model=model, images=images, labels=labels, data=(images, labels),
        fidelity=partial(fidelity, images=images, exact=exact),
    )  # fmt: skip


def fidelity(model, images, exact) -> float:
    """One less the relative error of the outputs: 1 for the float model, less for any that is quantized."""
    found = model({"image": images})["scores"]
    return 1.0 - float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def top1(model, images, labels) -> float:
    """Top-1 of a simulated model, as a user would write it."""
    return float((model({"image": images})["scores"].argmax(axis=1) == labels).mean())
