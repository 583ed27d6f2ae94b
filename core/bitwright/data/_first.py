"""The first samples of data as they lie in their files, before a model says what it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bitwright.files import Array, StoredArray, open_npy, open_npz

COUNT = 2
"""One sample may be taken for a size that is always 1."""


def first_arrays(path: Path) -> Array | dict[str, Array] | None:
    """What a model can be traced with: an array, or arrays by name; of a folder of .npz files the first one whole.

    Float64, numpy's own choice, becomes float32. None where the files are no arrays, such as images, whose size the
    model decides.

    Raises:
        InputError: a file can't be read.
    """
    if path.suffix == ".npy" and path.is_file():
        return _first(open_npy(path))
    if path.suffix == ".npz" and path.is_file():
        arrays = {name: _first(values) for name, values in open_npz(path).items()}
    elif files := sorted(path.glob("*.npz")) if path.is_dir() else []:
        arrays = {name: _first(values, None) for name, values in open_npz(files[0]).items()}
    else:
        return None
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def _first(values: Array | StoredArray, count: int | None = COUNT) -> Array:
    array = np.asarray(values[:count] if values.shape else values)
    return array.astype(np.float32) if array.dtype == np.float64 else array
