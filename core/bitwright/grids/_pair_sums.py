"""Sums of two neighbouring codes, which kernels that add products in twos in int16 must not let pass a limit.

The order of a weight's codes is that of the matrix product: the kernel's positions outside, a group's input channels
inside, in twos from the first one on; an odd one out stands alone. For who adds so see `bitwright.bundle`; why
sums of one sign are what counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIGHEST, LOWEST = 2**15 - 1, -(2**15)
"""The ends of int16."""
CHUNK = 2**22
"""Weights that are looked at in one go."""
_STEP = 1 + 2**-9
"""How finely scales are searched."""


def pair_limit(activation_bits: int) -> int:
    """The largest sum of two neighbours' codes of one sign that can't pass int16, whatever the activations are."""
    return int(HIGHEST // (2**activation_bits - 1))


def in_order(weight: NDArray[Any]) -> NDArray[Any]:
    """Canonical layout (out, in/groups, *kernel) or (out, in) → (out, K) in the order of the matrix product."""
    return (np.moveaxis(weight, 1, -1) if weight.ndim > 2 else weight).reshape(len(weight), -1)


def pair_sums(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(out, K) → the sums of the positive and those of the negative parts of neighbours, (out, ⌈K/2⌉) each."""
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    first, second = rows[:, 0::2], rows[:, 1::2]
    return np.maximum(first, 0) + np.maximum(second, 0), np.minimum(first, 0) + np.minimum(second, 0)


def fitted_scale(weight: NDArray[np.floating], scale: NDArray[np.floating], bits: int, limit: int) -> NDArray[Any]:
    """Scales of channels, raised where codes of two neighbours could pass `limit` together.

    Whichever way each weight is then rounded, down or up, its codes stay within, and with any larger scale they do:
    techniques that choose roundings keep what this grants. No channel gets two codes of −2**(bits − 1), which ARM's
    kernels can't add. With eight bits and a limit of 128 a scale is at most doubled, and most are raised by a quarter.

    Args:
        weight: canonical layout, channels on axis 0.
        scale: float32, (channels,), of a signed symmetric grid.
        bits: width of the grid.
        limit: see `pair_limit`.
    """
    rows = in_order(np.asarray(weight, np.float32))
    found = np.array(scale, np.float32)
    for part in row_chunks(rows):
        found[part] = _fitted(rows[part], found[part], 2 ** (bits - 1), limit)
    return found


def row_chunks(rows: NDArray[Any]) -> Iterator[slice]:
    """Slices of rows that hold `CHUNK` values each, at least one row."""
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _fitted(rows: NDArray[Any], found: NDArray[Any], top: int, limit: int) -> NDArray[Any]:
    left = np.arange(len(rows))
    while len(left):
        part = rows[left]
        codes = np.clip(np.sign(part) * np.ceil(np.abs(part) / found[left, None]), -top, top - 1)
        high, low = pair_sums(codes)
        peak = np.maximum(high.max(axis=1, initial=0), -low.min(axis=1, initial=0))
        over = (peak > limit) | ((codes == -top).sum(axis=1) > 1)
        left, peak = left[over], peak[over]
        # Each of the two codes may be one less than its ceiling, so that this never goes too far at once.
        factor = np.maximum(_STEP, (peak - 2) / limit)
        found[left] = np.nextafter((found[left] * factor).astype(np.float32), np.float32(np.inf))
    return found
