"""Arrays in files that are read piece by piece, by calls that a file which shrinks or changes meanwhile makes fail.

A memory map would do the same with fewer copies, but the system ends a process (SIGBUS) that touches a mapped page of
which the file has been cut off; calibration data are rewritten in place while runs go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright.errors import InputError
from bitwright.files._held import fill, stamp


@dataclass(frozen=True)
class StoredArray:
    """A numeric array in a file, in C order; `numpy.asarray` reads it, indices and slices of the first axis are parts.

    Attributes:
        path: the file.
        stamp: its size in bytes and time of change when it was opened.
        offset: where the values begin, in bytes.
        shape, dtype: of the array.
    """

    path: Path
    stamp: tuple[int, int]
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> StoredArray:
        inner = self.shape[1:]
        width = math.prod(inner) * self.dtype.itemsize
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise IndexError("only neighbouring samples can be read together")
            return replace(self, offset=self.offset + start * width, shape=(max(stop - start, 0), *inner))
        place = range(len(self))[index]
        return replace(self, offset=self.offset + place * width, shape=inner)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Read it.

        Raises:
            InputError: the file can't be read, or isn't the one any more that was opened.
        """
        values = np.empty(self.size, self.dtype)
        into = values.view(np.uint8).data if values.nbytes else memoryview(b"")
        try:
            with self.path.open("rb", buffering=0) as file:
                fill(self.path, file.fileno(), self.stamp, self.offset, into)
        except OSError as error:
            raise InputError(f"can't read {str(self.path)!r}: {error.strerror or error}") from error
        shaped = values.reshape(self.shape)
        return shaped if dtype is None else shaped.astype(dtype, copy=False)


def stored(path: Path, handle: int, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> StoredArray:
    """An array of a file that is open under a handle."""
    return StoredArray(path, stamp(handle), offset, shape, dtype)
