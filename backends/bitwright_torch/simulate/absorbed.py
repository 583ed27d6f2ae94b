"""Activation functions that a grid's own ends make superfluous: the codes are clipped where the function would clip.

Let d(v) = round(v / scale), v and the quotient float32, and c(v) = d(v) clipped to low … high. Division by a positive
number, rounding and clipping don't fall as v rises, from −∞ to ∞. So if d(floor) ≤ low, every v below the floor has
d(v) ≤ low, and c(v) = low = c(floor); and likewise above the ceiling, if d(ceiling) ≥ high. Between the bounds the
function changes nothing, and NaN stays NaN by either way. Then c(clip(v, floor, ceiling)) = c(v) for every float32.

It is so for ReLU and ReLU6 on every grid that begins at zero and ends at 6 or below, which calibration gives them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2**12)
def absorbs(scale: float, low: float, high: float, floor: float, ceiling: float) -> bool:
    """Whether rounding clips all that an activation function with these bounds clips, to the same codes.

    Args:
        scale: a float32 above 0.
        low, high: the codes' ends, seen from the zero point.
        floor, ceiling: of the function; computed in float32.
    """
    if not 0 < scale < float("inf"):
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        least, largest = (np.rint(np.float32(bound) / np.float32(scale)) for bound in (floor, ceiling))
    return bool(least <= low and largest >= high)
