"""Whether a captured model computes what the user's own does, in float: what all frameworks allow their kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRECISION = {"float16": 1e-2, "bfloat16": 6e-2}
"""How far outputs may differ, in parts of the largest one, where some op computes in that type; 1e-4 otherwise."""

SAMPLES = 4
"""How many of a sample's rows are compared."""


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


def trial_batches(
    specs: Sequence[tuple[Sequence[int | None], str]], sample: Sequence[NDArray[Any]] | None
) -> Iterator[list[NDArray[Any]]]:
    """What a model and its capture are compared on: a sample's first rows, or batches that are made up.

    These are normal numbers, then zeros and ones (for what may be indices), over two lengths of free dimensions:
    numbers that are made up needn't suit a model.

    Args:
        specs: shape (None where free) and dtype of each input.
        sample: the user's, in the same order.
    """
    if sample is not None:
        free = all(x.ndim and shape and shape[0] is None for x, (shape, _) in zip(sample, specs, strict=True))
        yield [x[:SAMPLES] for x in sample] if free and len({len(x) for x in sample}) == 1 else list(sample)
        return
    for length in (8, 64):
        for whole in (False, True):
            rng = np.random.default_rng(0)
            yield [_made_up(rng, shape, dtype, length, whole) for shape, dtype in specs]


def _made_up(
    rng: np.random.Generator, shape: Sequence[int | None], dtype: str, length: int, whole: bool
) -> NDArray[Any]:
    sizes = [2 if i == 0 and n is None else length if n is None else n for i, n in enumerate(shape)]
    drawn = rng.normal(size=sizes)
    return (drawn > -0.7).astype(np.float32) if whole or not dtype.startswith(("float", "bfloat")) else drawn
