"""The order in which files list the scales of blocks.

Schema 0.6.1 lists them in row-major order of the native scale tensor (the tensor's shape with the block axis
divided by the block size and all axes but two reduced to 1); schema 1.0.0 does so too, save for matrices, which it
lists channel by channel whichever way they are stored; schemas 2.x nest them in the native shape.
In memory they are always (channels, blocks). Axes may count from the end.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)


def pack(values: NDArray[T], axis: int, block_axis: int, rank: int, version: str) -> NDArray[T]:
    """(channels, blocks) → the flat order of schema 0.6.1 or 1.0.0."""
    return (values if _channel_major(axis, block_axis, rank, version) else values.T).reshape(-1)


def unpack(flat: NDArray[T], channels: int, *, axis: int, block_axis: int, rank: int, version: str) -> NDArray[T]:
    """The inverse of `pack`."""
    if _channel_major(axis, block_axis, rank, version):
        return flat.reshape(channels, -1)
    return flat.reshape(-1, channels).T


def nest(values: NDArray[T], axis: int, block_axis: int, rank: int) -> NDArray[T]:
    """(channels, blocks) → the native shape with ones on all other axes."""
    shape = [1] * rank
    shape[axis], shape[block_axis] = values.shape
    return (values if axis % rank < block_axis % rank else values.T).reshape(shape)


def unnest(values: NDArray[T], axis: int, block_axis: int) -> NDArray[T]:
    """The inverse of `nest`; all axes but the two must have length 1."""
    channels, blocks = values.shape[axis], values.shape[block_axis]
    if axis % values.ndim < block_axis % values.ndim:
        return values.reshape(channels, blocks)
    return values.reshape(blocks, channels).T


def _channel_major(axis: int, block_axis: int, rank: int, version: str) -> bool:
    return axis % rank < block_axis % rank or (version == "1.0.0" and rank == 2)
