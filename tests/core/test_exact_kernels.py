"""The integer kernels where they are most easily wrong: sums past float32, ties, tables and padding."""

import numpy as np
import pytest

from bitwright.graph import ConvAttrs, PoolAttrs
from bitwright.grids import Encoding
from bitwright.verify import _integer_kernels as kernels


def encoding(scale, zero=0, *, signed=False):
    return Encoding(8, signed, not zero, np.float32(scale), np.int32(zero))


@pytest.mark.parametrize("zeros", [(0, 0), (255, 255), (0, 255)])
def test_products_of_activations_are_exact_past_24_bits(zeros):
    """2,001 products of ±255 · ±255 pass 2^24 after 259 of them; there are three of everything else."""
    ea, eb = (encoding(0.1, zero) for zero in zeros)
    a, b = (
        np.full(shape, 255 - zero, np.int32) for shape, zero in zip([(2, 3, 2001), (2, 2001, 3)], zeros, strict=True)
    )
    a[..., 7], b[:, 9] = abs(zeros[0] - 2), abs(zeros[1] - 2)
    expected = (a.astype(np.int64) - zeros[0]) @ (b.astype(np.int64) - zeros[1])
    assert np.abs(expected).min() > 2**24
    np.testing.assert_array_equal(kernels.matmul(a, ea, b, eb), expected)


def test_softmax_rounds_shares_and_then_adds_the_zero_point():
    """512 equal classes have half of 256 levels each: 0, and not the even neighbour of 1.5."""
    found = kernels.softmax(np.full((1, 512), 7, np.int32), encoding(0.1), 1, encoding(1 / 256, 1))
    assert (found == 1).all()


def test_softmax_s_table_ends_at_the_largest_class():
    """2^20 classes leave 2^12 levels to the largest: 129 steps below, e^(-9.03) of them is 0.49, which is none. An
    entry more would make it 0.53, which is one, and as many as there are classes outweigh the largest."""
    codes = np.full((1, 2**20), 126, np.int32)
    codes[0, -1] = 255
    found = kernels.softmax(codes, encoding(0.07), 1, encoding(1 / 256))
    assert found[0, -1] == 255 and not found[0, :-1].any()


@pytest.mark.parametrize("pads", [((1, 1), (0, 0)), ((0, 0), (1, 1)), ((1, 1), (1, 1))])
def test_padding_of_any_axis_is_left_out_of_averages(pads):
    codes = np.full((1, 1, 4, 4), 40, np.int32)
    window = ConvAttrs((3, 3), (1, 1), (1, 1), pads)
    e = encoding(0.5)
    assert (kernels.average_pool(codes, e, PoolAttrs(window=window), e, e.grid) == 40).all()
    counted = kernels.average_pool(codes, e, PoolAttrs(window=window, count_include_pad=True), e, e.grid)
    assert counted.min() < 40 and counted.max() <= 40
