"""Arrays that are needed again much later, on disk in the meantime."""

from __future__ import annotations

import mmap
import weakref
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bitwright.files._scratch import scratch_file

HELD_BYTES = 2**26
"""Bytes that stay in memory before the first array goes to disk."""


class Spill:
    """Keeps arrays: the first in memory, the others in a temporary file without a name.

    Those are read-only maps of it, and so arrays like others; no other process can cut the file off. It goes with the
    last of them.

    Args:
        budget: bytes that stay in memory.
    """

    def __init__(self, budget: int | None = None) -> None:
        self._left = HELD_BYTES if budget is None else budget
        self._file: IO[bytes] | None = None

    def kept(self, values: NDArray[Any]) -> NDArray[Any]:
        """The same values; in memory where there is no room on disk."""
        if values.nbytes <= self._left or values.nbytes < mmap.PAGESIZE or is_spilled(values):
            self._left -= 0 if is_spilled(values) else values.nbytes
            return values
        try:
            if self._file is None:
                self._file = scratch_file()
                weakref.finalize(self, self._file.close)  # maps outlive it
            place = self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(values).view(np.uint8).data)
            self._file.flush()
            return np.memmap(self._file, values.dtype, "r", place, values.shape)
        except OSError:
            return values


def is_spilled(values: NDArray[Any]) -> bool:
    """Whether an array's values lie in a file, and can't be written to."""
    owner: Any = values
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap):
            return not values.flags.writeable
        owner = owner.base
    return False
