"""Grids of weights whose neighbours' codes have a limit: no smaller scales, no codes but the nearest two."""

import numpy as np
import pytest
from layers import make_layer

from bitwright.grids import PerChannel, QuantSpec
from bitwright_techniques.scale_search import full_range
from bitwright_techniques.weight_grid import WeightGrid


@pytest.mark.parametrize("limit", [None, 128])
def test_a_limit_holds_whatever_is_searched(limit):
    layer = make_layer("linear", spec=QuantSpec(8, granularity=PerChannel(0), pair_limit=limit))
    given = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding)
    for grid in (given, full_range(given, layer.weight)):
        smaller, larger = (grid.scaled(np.full(6, f)) for f in (0.5, 1.5))
        np.testing.assert_array_equal(smaller.scale, grid.scale if limit else grid.scale * np.float32(0.5))
        np.testing.assert_array_equal(larger.scale, grid.scale * np.float32(1.5))
        matrix = layer.weight[None]
        far = grid.nearest(matrix) + np.float32(3)
        kept = np.clip(far, *grid.neighbours(matrix)) if limit else far
        np.testing.assert_array_equal(grid.allowed(far, matrix), kept)
    assert (given.floor is None) == (limit is None)
