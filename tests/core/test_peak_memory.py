"""What looks at a network's largest weight takes a part of its size in memory, and finds what the whole would tell."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitwright.bundle._agreement import departure
from bitwright.grids import Encoding, PerTensor
from bitwright.placement import Extent
from bitwright.report._build import _sqnr

SIZE = 2**23 + 5
"""Values, more than a few parts."""


@pytest.fixture(scope="module")
def values() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(SIZE, np.float32)


@pytest.fixture(scope="module")
def grid() -> Encoding:
    return Encoding(4, True, True, np.array(0.3, np.float32), np.array(0, np.int32), PerTensor())


def peak(action: Callable[[], Any]) -> int:
    """Bytes at the highest, of numpy's arrays too."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_extents(values: np.ndarray[Any, Any]) -> None:
    turned = values[: SIZE - 5].reshape(-1, 1024).T
    assert peak(lambda: Extent.of(turned)) < values.nbytes
    assert Extent.of(turned) == Extent(
        float(np.abs(turned).max()), float(np.abs(turned).min()), scalar=False, binary=False
    )
    mask = np.zeros(SIZE, np.float32)
    mask[3] = -40
    assert Extent.of(mask) == Extent(40.0, 0.0, scalar=False, binary=True)
    mask[-1] = np.nan
    assert Extent.of(mask).binary
    mask[-1] = -np.inf
    assert Extent.of(mask).largest == np.inf and not Extent.of(mask).binary
    mask[-1] = 1
    assert not Extent.of(mask).binary


def test_rounding_and_its_error(values: np.ndarray[Any, Any], grid: Encoding) -> None:
    assert peak(lambda: grid.fake_quantize(values)) < 1.1 * values.nbytes
    noisy = grid.fake_quantize(values)
    assert peak(lambda: _sqnr(values, noisy)) < values.nbytes
    error = noisy.astype(np.float64) - values
    expected = 10 * np.log10(np.square(values, dtype=np.float64).sum() / np.square(error).sum())
    assert _sqnr(values, noisy) == pytest.approx(expected, rel=1e-12)


def test_tensors_that_are_compared(values: np.ndarray[Any, Any]) -> None:
    other = values * np.float32(1 + 2e-3)
    found = departure("logits", values, other, None)
    assert found is not None and found.share == pytest.approx(2e-3, rel=1e-3)
    assert peak(lambda: departure("logits", values, other, None)) < 1.5 * values.nbytes
