"""What must work of an installed bitwright, with the frameworks that are there: run by `matrix.py` in a folder.

Each framework's model goes the whole way: opened, calibrated, exported, and verified where there is an integer runtime.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bitwright import QuantSim, registry


def there(*names: str) -> bool:
    """Whether these can be imported."""
    return all(importlib.util.find_spec(name) for name in names)


def bitwright(*words: str) -> None:
    """A command, which must succeed."""
    subprocess.run([str(Path(sys.executable).with_name("bitwright")), *words], check=True, stdout=subprocess.DEVNULL)


def data() -> np.ndarray:
    """Eight samples of six features."""
    return np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


def core() -> None:
    """Without a framework: commands, and a technique on the reference backend."""
    for words in (["--version"], ["quantize", "--help"], ["targets"], ["techniques", "adaround"], ["plugins"]):
        bitwright(*words)
    from bitwright.testing.harness import run_technique
    from bitwright.testing.models import conv_bn_relu
    from bitwright.testing.reference import ReferenceBackend

    applied = run_technique(registry.technique("fold_batch_norm"), ReferenceBackend(), conv_bn_relu())
    assert applied.outcome.params


def onnx() -> None:
    """An ONNX file, by the command line."""
    from onnx import TensorProto, helper, numpy_helper, save

    rng = np.random.default_rng(1)
    layers = (("Gemm", ["x", "w1", "b1"], "h"), ("Relu", ["h"], "r"), ("Gemm", ["r", "w2", "b2"], "y"))
    nodes = [helper.make_node(kind, reads, [writes], f"op_{writes}") for kind, reads, writes in layers]
    shapes = {"w1": (6, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}
    weights = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in shapes.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", w]) for n, w in (("x", 6), ("y", 3))]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "net.onnx")
    np.save("data.npy", data())
    bitwright("quantize", "net.onnx", "--data", "data.npy", "--recipe", "adaround", "--out", "onnx", "--quiet")
    bitwright("verify", "onnx", "--quiet")


def torch() -> None:
    """A module."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    exported(QuantSim(model, torch.tensor(data())), "torch")


def keras() -> None:
    """A Keras model."""
    import keras

    layers = [keras.Input((6,)), keras.layers.Dense(5, activation="relu"), keras.layers.Dense(3)]
    exported(QuantSim(keras.Sequential(layers)), "keras")


def tensorflow() -> None:
    """A function."""
    import tensorflow as tf

    weight = tf.Variable(np.random.default_rng(2).normal(size=(6, 3)).astype(np.float32))

    @tf.function(input_signature=[tf.TensorSpec([None, 6], tf.float32, name="x")])
    def net(x: Any) -> Any:
        return tf.nn.relu(tf.matmul(x, weight))

    exported(QuantSim(net), "tensorflow")


def exported(sim: QuantSim, folder: str) -> None:
    """Calibrated, exported and verified."""
    sim.calibrate(data())
    sim.export(folder)
    bitwright("verify", folder, "--quiet")


def main() -> None:
    """All that can be here."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    core()
    ran = ["core"]
    found = {
        "onnx": ("onnx", "onnxruntime"),
        "torch": ("torch", "onnxruntime"),
        "keras": ("keras", "tensorflow"),
        "tensorflow": ("tensorflow", "onnxruntime"),
    }
    for name, needed in found.items():
        if there(*needed):
            globals()[name]()
            ran.append(name)
    if len(ran) > 1:  # without a backend it says so, and exits with 1
        bitwright("doctor")
    print(", ".join(ran))


if __name__ == "__main__":
    main()
