"""Every linear op as one matrix product: y[g] = matrix[g] @ columns[g] + bias, for g of `groups`.

For a weight in canonical layout, `to_matrix` gives (groups, out/groups, K) and `columns` turns an input batch
into (groups, K, rows), K = in/groups · kernel size, so that techniques need no convolution. Padding positions
are zeros in the columns, as they are for the op. A transposed convolution is the convolution, with stride 1 and
the flipped kernel, of its input with zeros between the elements (Dumoulin & Visin 2016, §4).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright.graph._graph import ConvAttrs, Op, OpKind

CHUNK_BYTES = 64 * 2**20
LONG = 4
"""Positions a channel of one sample from which a matrix product of its columns is as fast as one of many samples'."""


def groups_of(op: Op) -> int:
    """Number of independent matrix products."""
    return op.attrs.groups if isinstance(op.attrs, ConvAttrs) else 1


def to_matrix(op: Op, weight: NDArray[np.floating]) -> NDArray[np.floating]:
    """Weight in canonical layout → (groups, out/groups, K)."""
    groups = groups_of(op)
    if op.kind is not OpKind.CONV_TRANSPOSE:
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    spatial = tuple(range(2, weight.ndim))
    flipped = np.flip(weight, spatial)
    split = flipped.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return np.ascontiguousarray(np.swapaxes(split, 1, 2)).reshape(groups, weight.shape[1], -1)


def from_matrix(op: Op, matrix: NDArray[np.floating], shape: tuple[int, ...]) -> NDArray[np.floating]:
    """The inverse of `to_matrix`, for a weight of `shape`."""
    if op.kind is not OpKind.CONV_TRANSPOSE:
        return np.ascontiguousarray(matrix).reshape(shape)
    groups = groups_of(op)
    split = matrix.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
    flipped = np.ascontiguousarray(np.swapaxes(split, 1, 2)).reshape(shape)
    return np.ascontiguousarray(np.flip(flipped, tuple(range(2, len(shape)))))


def split_columns(matrix: NDArray[np.floating], blocks: int) -> NDArray[np.floating]:
    """(groups, rows, K) → (groups · blocks, rows, K / blocks): each row's features in as many equal parts."""
    groups, rows, features = matrix.shape
    parts = matrix.reshape(groups, rows, blocks, features // blocks)
    return np.swapaxes(parts, 1, 2).reshape(groups * blocks, rows, -1)


def join_columns(matrix: NDArray[np.floating], blocks: int) -> NDArray[np.floating]:
    """The inverse of `split_columns`."""
    parts, rows, features = matrix.shape
    whole = matrix.reshape(parts // blocks, blocks, rows, features)
    return np.swapaxes(whole, 1, 2).reshape(parts // blocks, rows, -1)


def input_channels(op: Op, weight_shape: tuple[int, ...]) -> int:
    """Channels (or features) of the op's input."""
    if op.kind is OpKind.CONV_TRANSPOSE:
        return weight_shape[0]
    return weight_shape[1] * groups_of(op)


def output_channels(op: Op, weight_shape: tuple[int, ...]) -> int:
    """Channels (or features) of the op's output."""
    return weight_shape[1] * groups_of(op) if op.kind is OpKind.CONV_TRANSPOSE else weight_shape[0]


def columns(op: Op, x: NDArray[np.floating], channel_axis: int | None = None) -> Iterator[NDArray[np.float32]]:
    """Input batch → chunks of columns (groups, K, rows), rows running over samples and output positions.

    Chunks of linear ops and of pointwise convolutions may be views of x.

    Args:
        op: a convolution, transposed convolution or linear op.
        x: (samples, channels, *spatial) or with channels on `channel_axis`; (…, features) for a linear op.
        channel_axis: where the channels of x lie; default 1. Not asked for a linear op: the network's channels may lie
            on another axis of what it reads (an MLP-Mixer's tokens), its features are on the last.

    Raises:
        ModelError: the op isn't linear, or x has the wrong rank.
    """
    x = np.asarray(x, np.float32)
    if op.kind is OpKind.LINEAR:
        yield from _rows(x)
        return
    if op.kind not in (OpKind.CONV, OpKind.CONV_TRANSPOSE) or not isinstance(op.attrs, ConvAttrs):
        raise ModelError(f"{op.id!r} ({op.type}) is not a linear op; only convolutions and linear ops have columns")
    attrs, rank = op.attrs, len(op.attrs.kernel)
    if x.ndim != rank + 2:
        raise ModelError(f"{op.id!r} takes an input of rank {rank + 2}, got shape {x.shape}")
    pointwise = op.kind is OpKind.CONV and attrs == ConvAttrs((1,) * rank, (1,) * rank, (1,) * rank, ((0, 0),) * rank)
    if pointwise and channel_axis in (-1, x.ndim - 1):
        yield from _rows(x)
        return
    if channel_axis not in (None, 1):
        x = np.moveaxis(x, channel_axis, 1)
    if pointwise and int(np.prod(x.shape[2:])) >= LONG * x.shape[1]:
        yield from x.reshape(*x.shape[:2], -1)[:, None]
        return
    if op.kind is OpKind.CONV_TRANSPOSE:
        attrs = as_convolution(attrs)
    spatial = output_spatial(x.shape[2:], attrs, dilate=op.attrs.strides if op.kind is OpKind.CONV_TRANSPOSE else None)
    per_sample = 4 * x.shape[1] * int(np.prod(attrs.kernel)) * int(np.prod(spatial))
    step = max(1, CHUNK_BYTES // max(per_sample, 1))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        if op.kind is OpKind.CONV_TRANSPOSE:
            part = _dilate(part, op.attrs.strides)
        yield _patches(part, attrs, spatial)


def _rows(x: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    flat = x.reshape(-1, x.shape[-1])
    step = max(1, CHUNK_BYTES // (4 * flat.shape[1]))
    for start in range(0, len(flat), step):
        yield flat[start : start + step].T[None]


def output_spatial(
    spatial: tuple[int, ...], attrs: ConvAttrs, dilate: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Spatial shape of a convolution's output (of a zero-dilated input, if `dilate` gives the steps)."""
    if dilate is not None:
        spatial = tuple((n - 1) * d + 1 for n, d in zip(spatial, dilate, strict=True))
    return tuple(
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(spatial, attrs.pads, attrs.dilations, attrs.kernel, attrs.strides, strict=True)
    )


def as_convolution(attrs: ConvAttrs) -> ConvAttrs:
    """The geometry of the convolution that a transposed one is, of its input with zeros between the elements."""
    extra = attrs.output_padding or (0,) * len(attrs.kernel)
    pads = tuple(
        (d * (k - 1) - begin, d * (k - 1) - end + e)
        for d, k, (begin, end), e in zip(attrs.dilations, attrs.kernel, attrs.pads, extra, strict=True)
    )
    return ConvAttrs(attrs.kernel, (1,) * len(attrs.kernel), attrs.dilations, pads, attrs.groups)


def _dilate(x: NDArray[np.float32], steps: tuple[int, ...]) -> NDArray[np.float32]:
    if all(s == 1 for s in steps):
        return x
    spatial = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], steps, strict=True)]
    wide = np.zeros((*x.shape[:2], *spatial), x.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in steps))] = x
    return wide


def _pad(x: NDArray[np.float32], pads: tuple[tuple[int, int], ...]) -> NDArray[np.float32]:
    # A transposed convolution may need negative padding, which crops.
    crop = tuple(slice(max(0, -b), n - max(0, -e)) for n, (b, e) in zip(x.shape[2:], pads, strict=True))
    x = x[(slice(None), slice(None), *crop)]
    grow = [(max(0, b), max(0, e)) for b, e in pads]
    return np.pad(x, [(0, 0), (0, 0), *grow]) if any(map(any, grow)) else x


def _patches(x: NDArray[np.float32], attrs: ConvAttrs, spatial: tuple[int, ...]) -> NDArray[np.float32]:
    x = np.moveaxis(_pad(x, attrs.pads), 1, 0)  # (channels, samples, *padded)
    channels, samples = x.shape[:2]
    taps = int(np.prod(attrs.kernel))
    out = np.empty((channels, taps, samples, *spatial), np.float32)
    for tap, offsets in enumerate(product(*(range(k) for k in attrs.kernel))):
        window = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s)
            for o, d, n, s in zip(offsets, attrs.dilations, spatial, attrs.strides, strict=True)
        )
        out[:, tap] = x[(slice(None), slice(None), *window)]
    return out.reshape(attrs.groups, channels // attrs.groups * taps, -1)
