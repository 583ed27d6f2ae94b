"""Factors of wide layers in one array: those of LAPACK, and what it refuses."""

import numpy as np
import pytest

from bitwright_techniques import rounding_descent, wide_factor
from bitwright_techniques.rounding_descent import factor


def gram(size: int, samples: int = 900) -> np.ndarray:
    x = np.random.default_rng(size).normal(size=(samples, size)) * np.linspace(0.1, 3, size)
    return (x.T @ x / samples + 0.05 * np.eye(size)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 63, 255, 257, 700])
def test_factors_are_those_of_the_whole_matrix(size, monkeypatch):
    matrices = np.stack([gram(size), gram(size) + np.eye(size, dtype=np.float32)])
    order, whole = factor(matrices)
    monkeypatch.setattr(rounding_descent, "WIDE", 0)
    again, wide = factor(matrices)
    assert np.array_equal(order, again)
    assert wide.dtype == np.float32 and not np.tril(wide, -1).any()
    np.testing.assert_allclose(wide, whole, rtol=2e-6, atol=1e-7 * np.abs(whole).max())


def test_what_rounding_took_below_zero_is_lifted_and_what_is_far_below_is_refused(monkeypatch):
    few = gram(300, samples=20) - np.float32(0.05) * np.eye(300, dtype=np.float32)  # of rank 20, and rounded
    monkeypatch.setattr(rounding_descent, "WIDE", 0)
    order, upper = factor(few[None])
    given = few[np.ix_(order[0], order[0])].astype(np.float64)
    assert np.isfinite(upper).all()
    lifted = upper[0].astype(np.float64) @ upper[0].astype(np.float64).T - given
    least, most = 2.0**-24 * np.trace(few), 2.0**-17 * np.trace(few)
    assert (np.diag(lifted) > least).all() and np.abs(lifted).max() < 1.01 * most
    with pytest.raises(np.linalg.LinAlgError):
        wide_factor.factor_in_place(-gram(300), np.arange(300))
    with pytest.raises(np.linalg.LinAlgError):
        wide_factor.factor_in_place(np.full((300, 300), np.nan, np.float32), np.arange(300))
