"""What each page takes for granted: the names and files that its blocks use before they make them.

Models are small, and data look like data: what is tested here are the blocks. Files go into the current folder.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation_given
import numpy as np

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
Names = dict[str, Any]


def images(count: int, *, channels_last: bool = False) -> np.ndarray:
    """Smooth pictures of 8² pixels, between 0 and 1."""
    rng = np.random.default_rng(3)
    waves = rng.uniform(0.2, 1.2, (count, 3, 1, 1)) * np.arange(8)[:, None] + rng.uniform(0, 6, (count, 3, 1, 1))
    shown = (0.5 + 0.5 * np.sin(waves) * rng.uniform(0.3, 1, (count, 3, 1, 8))).astype(np.float32)
    return np.ascontiguousarray(shown.transpose(0, 2, 3, 1)) if channels_last else shown


@functools.cache
def network() -> bytes:
    """An ONNX model: convolution, batch norm and ReLU6, a depthwise convolution, a classifier of five classes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)

    def weight(name: str, values: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(values, np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "stem.weight"], ["conv"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv", "gamma", "beta", "mean", "var"], ["norm"], "norm"),
        helper.make_node("Clip", ["norm", "low", "high"], ["clip"], "clip"),
        helper.make_node("Conv", ["clip", "depthwise.weight", "depthwise.bias"], ["dw"], "depthwise", group=32),
        helper.make_node("Relu", ["dw"], ["relu"], "relu"),
        helper.make_node("Conv", ["relu", "features.0.weight"], ["wide"], "features.0"),
        helper.make_node("GlobalAveragePool", ["wide"], ["pool"], "pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["scores"], "head", transB=1),
    ]
    weights = [
        weight("stem.weight", rng.normal(0, 0.4, (32, 3, 3, 3))), weight("gamma", rng.uniform(0.5, 1.5, 32)),
        weight("beta", rng.normal(0, 0.3, 32)), weight("mean", rng.normal(0, 0.3, 32)),
        weight("var", rng.uniform(0.5, 2, 32)), weight("low", 0.0), weight("high", 6.0),
        weight("depthwise.weight", rng.normal(0, 0.4, (32, 1, 3, 3))), weight("depthwise.bias", rng.normal(0, 0.3, 32)),
        weight("features.0.weight", rng.normal(0, 0.3, (32, 32, 1, 1))),
        weight("head.weight", rng.normal(0, 0.5, (5, 32))), weight("head.bias", rng.normal(0, 0.3, 5)),
    ]  # fmt: skip
    info = helper.make_tensor_value_info
    ends = [info("image", TensorProto.FLOAT, ["n", 3, 8, 8])], [info("scores", TensorProto.FLOAT, ["n", 5])]
    graph = helper.make_graph(nodes, "net", *ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()


def onnx_files(*names: str) -> Names:
    """Models of these names, and data beside them as files and as arrays."""
    import onnxruntime

    for name in names:
        Path(name).write_bytes(network())
    shown = images(96)
    scores = np.asarray(onnxruntime.InferenceSession(network()).run(None, {"image": shown})[0])
    clear = np.argsort(np.diff(np.sort(scores)[:, -2:]).ravel())[-32:]  # rounding shouldn't decide the class
    data, labels = shown[clear], scores[clear].argmax(1)
    for name in ("calibration", "calib", "test"):
        np.savez(f"{name}.npz", image=data)
    for name in ("labels", "test_labels"):
        np.save(f"{name}.npy", labels)

    def evaluate(model: Any) -> float:
        """Top-1 of a native model of the ONNX backend."""
        return float((model({"image": data})["scores"].argmax(1) == labels).mean())

    return {"calibration": data, "data": data, "test": data, "samples": data[:4], "batch": data[:4], "labels": labels,
            "evaluate": evaluate}  # fmt: skip


def with_simulation(*names: str, **options: Any) -> Names:
    """The same, with a simulation of the first."""
    import bitwright

    found = onnx_files(*names)
    return found | {"bitwright": bitwright, "sim": bitwright.QuantSim(names[0], **options).calibrate(found["data"])}


def torch_net() -> Names:
    import torch
    from torch import nn

    import bitwright

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(4, 8), torch.randn(4, 8)]
    return {"bitwright": bitwright, "QuantSim": bitwright.QuantSim, "torch": torch, "nn": nn, "model": model,
            "sample": batches[0], "batches": batches, "data": batches, "evaluate": lambda network: 1.0}  # fmt: skip


def keras_net(*parts: Any) -> Names:
    import keras

    import bitwright

    layers = [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(),
              keras.layers.ReLU(), keras.layers.Flatten(), keras.layers.Dense(2)]  # fmt: skip
    model, data = keras.Sequential(layers), images(8, channels_last=True)
    return {"keras": keras, "bitwright": bitwright, "QuantSim": bitwright.QuantSim, "model": model, "images": data,
            "data": data, "batches": [data[:4], data[4:]], "targets": np.zeros((8, 2)),
            "labels": np.zeros(8, int)}  # fmt: skip


def analysis() -> Names:
    """A target's dump lies beside: here another simulation's."""
    import bitwright

    found = onnx_files("mobilenet.onnx")
    other = bitwright.QuantSim("mobilenet.onnx", target="htp_v73", scheme="minmax").calibrate(found["data"])
    bitwright.layer_outputs(other, found["samples"], "target_dump")
    return found


def bank() -> Names:
    """A folder of photos, by batches."""
    found = onnx_files("model.onnx")
    Path("photos").mkdir()
    for number in range(2):
        np.savez(f"photos/{number}.npz", image=found["data"][16 * number : 16 * number + 16])
    return found


def photographed() -> Names:
    """A model, and a folder of pictures."""
    from PIL import Image

    Path("photos").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(f"photos/{number}.png")
    return onnx_files("mobilenet.onnx")


def clusters() -> Names:
    """A client: threads are executors too."""
    from concurrent.futures import ThreadPoolExecutor

    import bitwright

    return onnx_files("model.onnx") | {"QuantSim": bitwright.QuantSim, "auto_quantize": bitwright.auto_quantize,
                                       "client": ThreadPoolExecutor(1)}  # fmt: skip


def encodings() -> Names:
    """An export in `out`, and copies of its files under other names."""
    import bitwright

    found = onnx_files("mobilenet.onnx")
    sim = bitwright.QuantSim("mobilenet.onnx", target="htp_v73").apply("fold_batch_norm").calibrate(found["data"])
    sim.export("out", name="net")
    for name in ("a.encodings", "b.encodings", "mobilenet.encodings"):
        Path(name).write_bytes(Path("out/net.encodings").read_bytes())
    Path("a.onnx").write_bytes(Path("out/net.onnx").read_bytes())
    return found | {"sim": sim}


def exported(*names: str, stem: str = "mobilenet") -> Names:
    """Files, a simulation of the first, and its export in `out`."""
    found = with_simulation(*names, target="onnxruntime-cpu")
    found["sim"].export("out", name=stem)
    Path("out/model.qdq.onnx").write_bytes(Path(f"out/{stem}.qdq.onnx").read_bytes())
    return found


def keras_files() -> Names:
    """A model as files."""
    found = keras_net()
    for suffix in ("keras", "h5"):
        found["model"].save(f"model.{suffix}")
    import keras
    import tensorflow as tf

    class Train(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            return found["images"][4 * index : 4 * index + 4], found["labels"][4 * index : 4 * index + 4]

    return found | {"tf": tf, "train": Train(), "callbacks": []}


def tensorflow_session() -> Names:
    """A session with a loss and an accuracy, and batches of images and labels."""
    import tensorflow as tf

    v1, data = tf.compat.v1, images(8, channels_last=True)
    with tf.Graph().as_default():
        v1.set_random_seed(0)
        image = v1.placeholder(tf.float32, [None, 8, 8, 3], name="image")
        label = v1.placeholder(tf.int64, [None], name="label")
        kernel = v1.get_variable("kernel", initializer=tf.random.normal((3, 3, 3, 4)), use_resource=True)
        head = v1.get_variable("head", initializer=tf.random.normal((4, 2)), use_resource=True)
        pooled = tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(image, kernel, 1, "VALID")), [1, 2])
        logits = tf.identity(tf.matmul(pooled, head), name="logits")
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=label, logits=logits)
        tf.reduce_mean(losses, name="loss")
        tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, 1), label), tf.float32), name="accuracy")
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    labels = np.arange(8) % 2
    return {"tf": tf, "session": session, "images": data, "labels": labels, "tensor": tf.constant(data),
            "batches": [(data, labels)]}  # fmt: skip


def tensorrt() -> Names:
    """The page's own configuration as the file that it asks for."""
    found = onnx_files("mobilenet.onnx")
    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/deploy/tensorrt.md").read_text(encoding="utf-8"), re.S)
    Path("tensorrt.json").write_text(text)
    return found


def qat() -> Names:
    """A classifier in PyTorch with labels, one with a batch norm, and one in Keras."""
    found, of_keras = torch_net(), keras_net()
    torch, nn = found["torch"], found["nn"]
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    return found | {"keras_model": of_keras["model"], "images": of_keras["images"], "targets": of_keras["labels"],
                    "labels": [torch.arange(4), torch.arange(4)], "convolutional": convolutional.eval(),
                    "pictures": torch.tensor(images(8))}  # fmt: skip


def torch_training() -> Names:
    """A classifier whose encoder has layers of BERT's names, and a loop that trains."""
    found = torch_net()
    torch, nn, labels = found["torch"], found["nn"], np.arange(4) % 4

    def train(model: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for batch in found["batches"]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), torch.tensor(labels)).backward()
            optimizer.step()

    return found | {"train": train, "optimizer": torch.optim.SGD(found["model"].parameters(), 1e-3)}


def concepts() -> Names:
    """A loader of images and labels."""
    import torch

    found = torch_net()
    loader = [(batch, torch.zeros(4)) for batch in found["batches"]]
    return found | {"loader": loader, "sim": found["QuantSim"](found["model"], found["sample"])}


def write_a_backend() -> Names:
    """The framework that the page's backend is for, and what the fragments name."""
    import bitwright.dataflow as dataflow

    sys.path.append(str(EXAMPLES / "bitwright_layers"))
    return {"FlowBackend": dataflow.FlowBackend, "MyNet": dataflow.FlowModel}


GIVEN: dict[str, Callable[[], Names]] = {
    "analysis.md": analysis,
    "auto-quant.md": lambda: onnx_files("mobilenet.onnx"),
    "bank.md": bank,
    "clusters.md": clusters,
    "coming-from-aimet.md": keras_net,
    "coming-from-others.md": torch_net,
    "concepts.md": concepts,
    "encodings.md": encodings,
    "evaluation.md": lambda: evaluation_given.given(images(96)),
    "index.md": lambda: onnx_files("model.onnx"),
    "keras-export.md": keras_files,
    "keras.md": keras_files,
    "mixed-precision.md": lambda: with_simulation("model.onnx"),
    "on-target.md": lambda: exported("mobilenet.onnx"),
    "pytorch.md": torch_training,
    "techniques.md": lambda: onnx_files("mobilenet.onnx"),
    "quickstart.md": photographed,
    "deploy/onnxruntime.md": lambda: onnx_files("mobilenet.onnx"),
    "deploy/openvino.md": lambda: onnx_files("mobilenet.onnx"),
    "deploy/qualcomm.md": lambda: onnx_files("mobilenet.onnx"),
    "deploy/tensorrt.md": tensorrt,
    "guidebook.md": lambda: onnx_files("mobilenet.onnx"),
    "qat.md": qat,
    "tensorflow.md": tensorflow_session,
    "warnings.md": lambda: onnx_files("mobilenet.onnx"),
    "workflow.md": lambda: onnx_files("mobilenet.onnx"),
    "write-a-backend.md": write_a_backend,
    "write-a-runtime.md": lambda: exported("mobilenet.onnx"),
}
