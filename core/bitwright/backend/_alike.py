"""Whether a captured model computes what the user's own does, in float: what all frameworks allow their kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRECISION = {"float16": 1e-2, "bfloat16": 6e-2}
"""How far outputs may differ, in parts of the largest one, where some op computes in that type; 1e-4 otherwise."""


def precision_of(dtypes: Iterable[str]) -> float:
    """How far outputs of a model with tensors of these types may differ, in parts of the largest one."""
    return max((PRECISION.get(dtype, 1e-4) for dtype in dtypes), default=1e-4)


def alike(expected: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]], precision: float) -> bool:
    """Whether outputs are the same but for float rounding.

    Args:
        expected: of the user's model.
        found: of its capture, in the same order.
        precision: see `precision_of`. Of integers and booleans, one in twenty may differ: a rounding may turn one
            decision of many over.
    """
    return len(expected) == len(found) and all(_near(a, b, precision) for a, b in zip(expected, found, strict=True))


def _near(a: NDArray[Any], b: NDArray[Any], precision: float) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        return bool(np.count_nonzero(a != b) <= 0.05 * a.size)
    finite = np.abs(a[np.isfinite(a)]).astype(np.float64)
    near = max(precision * float(finite.max(initial=0)), 1e-7)
    return bool(np.allclose(a, b, rtol=10 * precision, atol=near, equal_nan=True))
