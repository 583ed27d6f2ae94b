"""Every linear op as a matrix product, against convolutions written out as loops."""

import numpy as np
import pytest
from direct_convolution import CASES, conv_op, direct, tensors

from bitwright.errors import ModelError
from bitwright.graph import Op, OpKind, columns, from_matrix, groups_of, input_channels, output_channels, to_matrix


def product(op, x, w, channel_axis=None):
    """Output by matrix products, as (channels, positions)."""
    matrix = to_matrix(op, w).astype(np.float64)
    parts = [matrix @ c.astype(np.float64) for c in columns(op, x, channel_axis)]
    return np.concatenate(parts, axis=2).reshape(output_channels(op, w.shape), -1)


@pytest.mark.parametrize("name", CASES)
def test_convolutions(name):
    op, x, w = tensors(name)
    y = direct(op, x, w)
    assert input_channels(op, w.shape) == x.shape[1]
    assert output_channels(op, w.shape) == y.shape[1]
    assert np.allclose(product(op, x, w), np.moveaxis(y, 1, 0).reshape(y.shape[1], -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["even", "strided_padded", "depthwise", "transposed_output_padding", "conv3d"])
def test_channels_last(name):
    op, x, w = tensors(name)
    nhwc = np.moveaxis(x, 1, -1)
    assert np.array_equal(product(op, nhwc, w, x.ndim - 1), product(op, x, w))
    assert np.array_equal(product(op, nhwc, w, -1), product(op, x, w))


@pytest.mark.parametrize("name", ["grouped", "depthwise", "transposed", "conv1d", "transposed_grouped_dilated"])
def test_small_chunks_change_nothing(name, monkeypatch):
    op, x, w = tensors(name)
    whole, product_of_whole = np.concatenate(list(columns(op, x)), axis=2), product(op, x, w)
    monkeypatch.setattr("bitwright.graph._linear_form.CHUNK_BYTES", 1)
    chunks = list(columns(op, x))
    assert len(chunks) == len(x)
    assert np.array_equal(np.concatenate(chunks, axis=2), whole)
    # Matrix products of other widths may add in another order, as the machine's BLAS likes.
    assert np.allclose(product(op, x, w), product_of_whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_weights_round_trip(name):
    op, _, w = tensors(name)
    matrix = to_matrix(op, w)
    assert len(matrix) == groups_of(op)
    assert np.array_equal(from_matrix(op, matrix, w.shape), w)


def test_linear_with_extra_dimensions():
    op = Op("fc", OpKind.LINEAR, "MatMul", ("x",), ("y",))
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 5, 4)).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    y = product(op, x, w)
    assert np.allclose(y.T.reshape(2, 3, 5, 6), x.astype(np.float64) @ w.T.astype(np.float64))
    assert np.array_equal(product(op, x, w, 1), y), "features lie last, whichever axis the network's channels are on"
    assert np.array_equal(from_matrix(op, to_matrix(op, w), w.shape), w)


def test_errors_name_the_op():
    with pytest.raises(ModelError, match=r"'layer'.*rank 4"):
        next(columns(conv_op(OpKind.CONV, CASES["plain"][1]), np.zeros((2, 4, 6))))
    with pytest.raises(ModelError, match=r"'r' .*not a linear op"):
        next(columns(Op("r", OpKind.RELU, "Relu", ("x",), ("y",)), np.zeros((2, 3))))
