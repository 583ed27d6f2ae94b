"""What the page on evaluation takes for granted: networks of random weights, and data with what they find in float."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples" / "evaluation"
CELLS, CLASSES, COORDINATES = 16, 3, 4


def given(images: np.ndarray) -> dict[str, Any]:
    """In the current folder: the example's files, `detector.onnx` and `segmenter.onnx`, and their data.

    Args:
        images: (n, 3, 8, 8); the first 32 to evaluate on, the others to calibrate.
    """
    from onnx.helper import make_node as node

    for file in EXAMPLES.glob("*.py"):
        Path(file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    cells = [node("Conv", ["stem", "cells.weight"], ["cells"], "cells", strides=[2, 2]),
             node("Relu", ["cells"], ["features"], "features")]  # fmt: skip
    boxes = [node("Mul", ["where", "corners"], ["sides"], "sides"), node("Add", ["sides", "centres"], ["boxes"], "add")]
    detector = saved("detector", [*cells, *head("what", "scores"), *head("where", "where"), *boxes],
                     {"boxes": ["n", CELLS, COORDINATES], "scores": ["n", CELLS, CLASSES]})  # fmt: skip
    pixel = node("Conv", ["stem", "pixel.weight"], ["logits"], "pixel")
    segmenter = saved("segmenter", [pixel], {"logits": ["n", 4, 8, 8]})
    test, suppressed = images[:32], runpy.run_path("detection.py")["suppressed"]
    outputs = detector.run(["boxes", "scores"], {"image": test})
    found = [suppressed(*one, least=0.5) for one in zip(*outputs, strict=True)]
    owner = np.repeat(np.arange(len(found)), [len(one.boxes) for one in found])
    every = {name: np.concatenate([getattr(one, name) for one in found]) for name in ("boxes", "labels")}
    np.savez("detection.npz", images=test, owner=owner, **every)
    np.savez("segmentation.npz", images=test, masks=segmenter.run(None, {"image": test})[0].argmax(1))
    np.savez("calibration.npz", image=images[32:])
    return {}


def head(name: str, output: str) -> list[Any]:
    """A sigmoid of a 1 × 1 convolution, as (samples, cells, channels)."""
    from onnx.helper import make_node as node

    parts = [("Conv", [f"{name}.weight"]), ("Sigmoid", []), ("Reshape", [f"{name}.shape"])]
    names = ["features", *(f"{name}.{i}" for i in range(3))]
    nodes = [node(kind, [names[i], *more], [names[i + 1]], f"{name}.{kind}") for i, (kind, more) in enumerate(parts)]
    return [*nodes, node("Transpose", [names[-1]], [output], f"{name}.rows", perm=[0, 2, 1])]


def saved(name: str, nodes: Sequence[Any], outputs: dict[str, list[Any]]) -> Any:
    """A file of these nodes behind a convolution of the image; opened in ONNX Runtime."""
    import onnx
    import onnxruntime
    from onnx import TensorProto
    from onnx.helper import make_graph, make_model, make_node, make_opsetid
    from onnx.helper import make_tensor_value_info as info

    rng = np.random.default_rng(5)
    shapes = {"stem": (16, 3, 3, 3), "cells": (16, 16, 2, 2), "what": (CLASSES, 16, 1, 1),
              "where": (COORDINATES, 16, 1, 1), "pixel": (4, 16, 1, 1)}  # fmt: skip
    arrays = {f"{n}.weight": rng.normal(0, 0.4, s).astype(np.float32) for n, s in shapes.items()}
    middle = np.stack([*np.meshgrid(np.arange(1, 8, 2), np.arange(1, 8, 2))] * 2, -1)
    arrays |= {"corners": np.float32([-2, -2, 2, 2]), "centres": middle.reshape(CELLS, 4).astype(np.float32),
               "what.shape": np.int64([0, CLASSES, CELLS]),
               "where.shape": np.int64([0, COORDINATES, CELLS])}  # fmt: skip
    stem = [make_node("Conv", ["image", "stem.weight"], ["wide"], "stem", pads=[1, 1, 1, 1]),
            make_node("Relu", ["wide"], ["stem"], "relu")]  # fmt: skip
    used = {tensor for one in (*stem, *nodes) for tensor in one.input}
    weights = [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items() if n in used]
    inputs = [info("image", TensorProto.FLOAT, ["n", 3, 8, 8])]
    graph = make_graph(
        [*stem, *nodes], name, inputs, [info(n, TensorProto.FLOAT, s) for n, s in outputs.items()], weights
    )
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=8), f"{name}.onnx")
    return onnxruntime.InferenceSession(f"{name}.onnx")
