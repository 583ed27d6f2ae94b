"""Tensors that a runtime holds in another shape than the model: read where the order of values is known."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.bundle import in_shape


@pytest.mark.parametrize(
    ("held", "shape"),
    [((12, 5), (2, 6, 5)), ((2, 1, 6, 5), (2, 6, 5)), ((2, 30), (2, 6, 5)), ((2, 6, 5), (2, 30)), ((2, 6), (2, 6))],
)
def test_merged_axes(held: tuple[int, ...], shape: tuple[int, ...]) -> None:
    found = in_shape(np.arange(np.prod(held)).reshape(held), shape)
    assert found is not None and found.shape == shape
    assert found.ravel().tolist() == list(range(found.size))


@pytest.mark.parametrize(("held", "shape"), [((2, 5, 6), (2, 6, 5)), ((10, 6), (2, 6, 5)), ((2, 6), (2, 6, 5))])
def test_another_order_of_axes_is_not_guessed(held: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert in_shape(np.zeros(held), shape) is None
