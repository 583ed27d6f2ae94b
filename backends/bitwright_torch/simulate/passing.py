"""Which values a grid doesn't clip, as limits of float32: the gradient to them passes without their codes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

LARGEST = 2.0**22
"""Codes up to which a half beside them is a float32."""


@lru_cache(maxsize=2**12)
def passing(scale: float, low: float, high: float) -> tuple[float, float] | None:
    """The float32 next below the least x with low ≤ round(x / scale) ≤ high, and the one next above the largest.

    So the gradient passes strictly between them. Division and rounding rise with x, so that each limit is found next
    to (low − ½) · scale and (high + ½) · scale.

    Args:
        scale: a float32 above 0.
        low, high: whole numbers.

    Returns:
        Both limits; None where they can't be told.
    """
    if not 0 < scale < float("inf") or not -LARGEST < low <= high < LARGEST:
        return None
    least, largest = _largest(np.float32(scale), -low), _largest(np.float32(scale), high)
    if least is None or largest is None:
        return None
    return float(np.nextafter(-least, np.float32(-np.inf))), float(np.nextafter(largest, np.float32(np.inf)))


def _largest(scale: np.float32, code: float) -> np.float32 | None:
    """The largest float32 whose quotient rounds to `code` or less, halves to even."""
    quotient = np.float32(code + 0.5)
    if code % 2:
        quotient = np.nextafter(quotient, np.float32(-np.inf))
    infinity = np.float32(np.inf)
    with np.errstate(over="ignore", under="ignore"):
        x = np.float32(quotient * scale)
        for _ in range(4):  # the product is rounded, and so is the quotient
            if x / scale > quotient:
                x = np.nextafter(x, -infinity)
            elif (above := np.nextafter(x, infinity)) / scale <= quotient and above < infinity:
                x = above
            else:
                return x
    return None
