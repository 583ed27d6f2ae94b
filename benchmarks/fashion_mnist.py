"""Fashion-MNIST from its idx files, as Debian's package dataset-fashion-mnist installs them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def read(folder, part):
    """Images (N, 28, 28) of uint8 and labels (N,) of int64; `part` is "train" or "t10k"."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels.astype(np.int64)


def read_normalized(folder, part):
    """The same with images of float32, of mean 0 and deviation 1 over the training images."""
    images, labels = read(folder, part)
    return (images.astype(np.float32) / 255 - 0.286) / 0.353, labels
