"""Mean intersection over union of a segmentation network, for `--evaluate segmentation.py:mean_iou` (ONNX) or
`…:torchvision_mean_iou`.

The evaluation data lie in segmentation.npz in the current folder: `images` (n, 3, height, width) and `masks`
(n, height, width) of classes; pixels of 255 don't count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
IGNORED = 255
BATCH = 8


def mean_iou(model: Callable[[dict[str, Array]], dict[str, Array]]) -> float:
    """Of an ONNX model whose output `logits` is (n, classes, height, width)."""
    return evaluated(lambda images: model({"image": images})["logits"])


def torchvision_mean_iou(model: Any) -> float:
    """Of a network of `torchvision.models.segmentation`, whose outputs are a mapping with the logits as `out`."""
    import torch

    def logits(images: Array) -> Array:
        with torch.inference_mode():
            found: Array = model(torch.tensor(images))["out"].numpy()
            return found

    return evaluated(logits)


def evaluated(logits: Callable[[Array], Array]) -> float:
    """Mean intersection over union on segmentation.npz, of a function from images to logits."""
    with np.load("segmentation.npz") as data:
        images, masks = data["images"], data["masks"]
    counts: Array = np.zeros((0, 0), np.int64)
    for i in range(0, len(images), BATCH):
        found = logits(images[i : i + BATCH])
        counts = counted(counts, found.argmax(1), masks[i : i + BATCH], found.shape[1])
    return iou(counts)


def counted(counts: Array, found: Array, masks: Array, classes: int) -> Array:
    """The pixels by true and found class, these batches' added."""
    counts = counts if counts.size else np.zeros((classes, classes), np.int64)
    seen = masks != IGNORED
    pairs = classes * masks[seen].astype(np.int64) + found[seen]
    return counts + np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def iou(counts: Array) -> float:
    """The mean over the classes that are there, as truth or as found."""
    hits = np.diag(counts)
    either = counts.sum(0) + counts.sum(1) - hits
    return float((hits[either > 0] / either[either > 0]).mean())
