"""Class labels for accuracy, and accuracy itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError

Labels = NDArray[np.int64]


def read_labels(path: Path, samples: int | None) -> Labels:
    """Class indices from a .npy file, one for each sample.

    Raises:
        InputError: unreadable, not one-dimensional integers, or not as many as there are samples.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"can't read labels {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(values, np.ndarray):
        raise InputError(f"labels {str(path)!r} must be a .npy file with one array, not an archive of several")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise InputError(
            f"labels {str(path)!r} are {values.dtype} of shape {values.shape}; class indices, one a sample, are needed"
        )
    if samples is not None and len(values) != samples:
        raise InputError(f"there are {len(values)} labels in {str(path)!r} for {samples} samples")
    return np.asarray(values, np.int64)


def classes(outputs: NDArray[Any]) -> Labels:
    """The largest score's index in each sample's output."""
    return np.asarray(outputs.reshape(len(outputs), -1).argmax(axis=1), np.int64)


def top1(predicted: Labels, labels: Labels) -> float:
    """The share of right predictions.

    Raises:
        InputError: the numbers of predictions and labels differ.
    """
    if len(predicted) != len(labels):
        raise InputError(f"there are {len(labels)} labels for {len(predicted)} samples")
    return float((predicted == labels).mean())
