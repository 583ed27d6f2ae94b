"""The offset convention of schemas 0.6.1 and 1.0.0.

The offset is that of the unsigned grid, whose lowest code is 0: offset = −(code of 0.0), from −(2**bits − 1) to 0.
A symmetric grid has −2**(bits − 1); one without the lowest code (strict) counts from the next and has
−(2**(bits − 1) − 1), by which readers know it; one of data that are never negative (unsigned symmetric) has 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.formats._entries import Entry


def zero_point_of(offset: NDArray[np.int64], bits: int, symmetric: bool) -> tuple[NDArray[np.int64], bool]:
    """`Entry.zero_point` and `Entry.strict` of a file's offsets."""
    middle = 1 << (bits - 1)
    if symmetric and (offset == 1 - middle).all():
        return np.full(offset.shape, middle), True
    return -offset, False


def offset_of(name: str, entry: Entry) -> NDArray[np.int64]:
    """A file's offsets for an entry.

    Raises:
        EncodingError: a strict grid whose zero isn't the middle code, which the convention can't tell.
    """
    if not entry.strict:
        return -entry.zero_point
    if not (entry.zero_point == entry.middle).all():
        raise EncodingError(f"tensor {name!r}: a grid without its lowest code must have its zero in the middle")
    return np.full(entry.zero_point.shape, 1 - entry.middle)
