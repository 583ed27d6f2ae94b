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
    return not gap(expected, found, precision)


def gap(
    expected: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]], precision: float, names: Sequence[str] = ()
) -> str:
    """How outputs differ, in words; empty where they are `alike`.

    Args:
        expected, found, precision: see `alike`.
        names: of the outputs, if they have any.
    """
    if len(expected) != len(found):
        return f"{len(found)} outputs instead of {len(expected)}"
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        name = f"output {names[i]!r}" if len(names) == len(expected) else f"output {i}"
        if a.shape != b.shape:
            return f"{name} has shape {list(b.shape)} instead of {list(a.shape)}"
        if a.dtype != b.dtype:
            return f"{name} is {b.dtype} instead of {a.dtype}"
        if not _near(a, b, precision):
            return f"{name} {_far(a, b)}"
    return ""


def _far(a: NDArray[Any], b: NDArray[Any]) -> str:
    if not _rounded(a):
        return f"has {np.count_nonzero(a != b)} other values of {a.size}"
    wide, other = _wide(a), _wide(b)
    both = np.isfinite(wide) & np.isfinite(other)
    far, most = (float(np.abs(x[both]).max(initial=0)) for x in (wide - other, wide))
    odd = int(np.count_nonzero(~both))
    return f"differs by up to {far:.3g} where values reach {most:.3g}" + (f", {odd} of them not finite" if odd else "")


def _near(a: NDArray[Any], b: NDArray[Any], precision: float) -> bool:
    if not _rounded(a):
        return bool(np.count_nonzero(a != b) <= 0.05 * a.size)
    wide, other = _wide(a), _wide(b)
    near = max(precision * float(np.abs(wide[np.isfinite(wide)]).max(initial=0)), 1e-7)
    return bool(np.allclose(wide, other, rtol=10 * precision, atol=near, equal_nan=True))


def _rounded(values: NDArray[Any]) -> bool:
    """Whether values are of a type that computing rounds; numpy knows bfloat16 by its name alone."""
    return values.dtype.kind in "fc" or values.dtype.name in PRECISION


def _wide(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def trial_batches(
    specs: Sequence[tuple[Sequence[int | None], str]], sample: Sequence[Any] | None, fewest: int = 1
) -> Iterator[list[Any]]:
    """What a model and its capture are compared on: a sample's first rows, or the whole of it where they count on each
    other (as indices of rows do), or batches that are made up.

    These are normal numbers, then zeros and ones (for what may be indices), over two lengths of free dimensions:
    numbers that are made up needn't suit a model.

    Args:
        specs: shape (None where free) and dtype of each input.
        sample: the user's, in the same order; arrays of any framework that are indexed as numpy's.
        fewest: rows that the model takes.
    """
    if sample is not None:
        rows = max(SAMPLES, fewest)
        if in_rows(specs, sample) and len(sample[0]) > rows:
            yield [x[:rows] for x in sample]
        yield list(sample)
        return
    for length in (8, 64):
        for whole in (False, True):
            rng = np.random.default_rng(0)
            yield [_made_up(rng, shape, dtype, length, whole) for shape, dtype in specs]


def in_rows(specs: Sequence[tuple[Sequence[int | None], str]], batch: Sequence[Any]) -> bool:
    """Whether the first axes of a batch are its samples, as many in each input as the capture leaves free."""
    free = all(x.ndim and shape and shape[0] is None for x, (shape, _) in zip(batch, specs, strict=True))
    return free and len({len(x) for x in batch}) == 1


def _made_up(
    rng: np.random.Generator, shape: Sequence[int | None], dtype: str, length: int, whole: bool
) -> NDArray[Any]:
    sizes = [2 if i == 0 and n is None else length if n is None else n for i, n in enumerate(shape)]
    drawn = rng.normal(size=sizes)
    return (drawn > -0.7).astype(np.float32) if whole or not dtype.startswith(("float", "bfloat")) else drawn
