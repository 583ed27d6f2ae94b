"""Codes of 2, 4 or 8 bits in words of 32, the first in the lowest bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def packed(codes: NDArray[np.uint8], bits: int, order: Sequence[int] | None = None) -> NDArray[np.int32]:
    """(…, n) codes as (…, n·bits/32) words; n fills whole words.

    Args:
        codes: the lowest is 0.
        bits: of a code; divides 32.
        order: which code of a word's comes first, second, …; None leaves them as they are.
    """
    per_word = 32 // bits
    split = codes.reshape(*codes.shape[:-1], -1, per_word)
    split = split if order is None else split[..., list(order)]
    words = np.zeros(split.shape[:-1], np.uint32)
    for i in range(per_word):
        words |= split[..., i].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


def unpacked(words: NDArray[np.int32], bits: int, order: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """The inverse of `packed`."""
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    split = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    split = split if order is None else split[..., np.argsort(order)]
    return split.astype(np.uint8).reshape(*words.shape[:-1], -1)
