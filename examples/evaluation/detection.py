"""Mean average precision of a detector, for `--evaluate detection.py:onnx_detector` or `…:torchvision_detector`.

The evaluation data lie in detection.npz in the current folder: `images` (n, 3, height, width), and of all images' true
boxes together `boxes` (m, 4) as left, top, right, bottom in pixels, `labels` (m,), and `owner` (m,), the image's index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
COCO = tuple(0.5 + 0.05 * np.arange(10))
"""Overlaps (IoU) from which on a box counts as found; the mean over them is what COCO calls AP."""
BATCH = 8


class Found(NamedTuple):
    """What was found in one image: boxes (k, 4), scores (k,), labels (k,)."""

    boxes: Array
    scores: Array
    labels: Array


def onnx_detector(model: Callable[[dict[str, Array]], dict[str, Array]]) -> float:
    """Of a model whose outputs are all candidates: `boxes` (n, k, 4), `scores` (n, k, classes)."""

    def detect(images: Array) -> Iterator[Found]:
        outputs = model({"image": images})
        for boxes, scores in zip(outputs["boxes"], outputs["scores"], strict=True):
            yield suppressed(boxes, scores)

    return evaluated(detect)


def torchvision_detector(model: Any) -> float:
    """Of a detector of `torchvision.models.detection`, which takes a list of images."""
    import torch

    def detect(images: Array) -> Iterator[Found]:
        with torch.inference_mode():
            for one in model([torch.tensor(image) for image in images]):
                yield Found(*(one[name].numpy() for name in ("boxes", "scores", "labels")))

    return evaluated(detect)


def evaluated(detect: Callable[[Array], Iterator[Found]]) -> float:
    """Mean average precision on detection.npz."""
    with np.load("detection.npz") as data:
        images, boxes, labels, owner = (data[name] for name in ("images", "boxes", "labels", "owner"))
    found = [one for i in range(0, len(images), BATCH) for one in detect(images[i : i + BATCH])]
    truth = [(boxes[owner == i], labels[owner == i]) for i in range(len(images))]
    return mean_average_precision(found, truth)


def suppressed(boxes: Array, scores: Array, least: float = 0.05, overlap: float = 0.5, most: int = 100) -> Found:
    """The best candidates of each class (scores at least `least`), none of which overlaps a better one of its class."""
    kept: list[tuple[float, int, int]] = []
    for label in range(scores.shape[1]):
        rest = [i for i in np.argsort(-scores[:, label], kind="stable") if scores[i, label] >= least]
        while rest:
            best, *others = rest
            kept.append((float(scores[best, label]), int(best), label))
            shared = overlaps(boxes[[best]], boxes[others])[0]
            rest = [i for i, iou in zip(others, shared, strict=True) if iou <= overlap]
    kept = sorted(kept, reverse=True)[:most]
    index = np.array([i for _, i, _ in kept], int)
    return Found(boxes[index], np.array([s for s, _, _ in kept]), np.array([c for _, _, c in kept], int))


def overlaps(a: Array, b: Array) -> Array:
    """Intersection over union of each two boxes: (len(a), len(b))."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(-1) for x in (a, b)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9)


def mean_average_precision(
    found: list[Found], truth: list[tuple[Array, Array]], thresholds: tuple[float, ...] = COCO
) -> float:
    """The mean over thresholds, and over the classes that have a true box."""
    present = sorted({int(label) for _, labels in truth for label in labels})
    return float(np.mean([average_precision(found, truth, label, t) for t in thresholds for label in present]))


def average_precision(found: list[Found], truth: list[tuple[Array, Array]], label: int, threshold: float) -> float:
    """The area under the curve of precision over recall, precision made to fall (as PASCAL VOC does since 2010).

    From the highest score on, a box is right if a true one of its image and class that no better box has taken
    overlaps it by `threshold` or more.
    """
    ranked: list[tuple[float, bool]] = []
    total = 0
    for one, (boxes, labels) in zip(found, truth, strict=True):
        mine, wanted = one.labels == label, boxes[labels == label]
        total += len(wanted)
        free = overlaps(one.boxes[mine], wanted)
        for i in np.argsort(-one.scores[mine], kind="stable"):
            best = int(free[i].argmax()) if len(wanted) else -1
            right = best >= 0 and bool(free[i, best] >= threshold)
            if right:
                free[:, best] = -1
            ranked.append((float(one.scores[mine][i]), right))
    hits = np.array([right for _, right in sorted(ranked, key=lambda pair: -pair[0])], bool)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(falling[hits].sum() / total)  # each hit is a step of 1 / total along recall
