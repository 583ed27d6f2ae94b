"""Class labels for accuracy, and accuracy itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError

Labels = NDArray[np.int64]


def read_labels(path: Path, samples: int | None) -> Labels:
    """Class indices from a file (see `data.labels`), as many as there are samples.

    Raises:
        InputError: unreadable, not class indices, or too few or many of them.
    """
    from bitwright.data import labels

    values = labels(path)
    if samples is not None and len(values) != samples:
        raise InputError(f"there are {len(values)} labels in {str(path)!r} for {samples} samples")
    return values


def classes(outputs: NDArray[Any]) -> Labels:
    """The largest score's index in each sample's output.

    Raises:
        InputError: it isn't (samples, classes), has one class, or a score is NaN or infinite.
    """
    from bitwright.metrics import class_scores

    return np.asarray(class_scores("labels", outputs).argmax(axis=1), np.int64)


def top1(predicted: Labels, labels: Labels) -> float:
    """The share of right predictions.

    Raises:
        InputError: the numbers of predictions and labels differ.
    """
    if len(predicted) != len(labels):
        raise InputError(f"there are {len(labels)} labels for {len(predicted)} samples")
    return float((predicted == labels).mean())
