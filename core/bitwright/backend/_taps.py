"""Taps: which tensors a session hands out, whole, thinned or reduced inside the graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import TensorId

Reduction = Literal["none", "minmax"]


@dataclass(frozen=True)
class Places:
    """Some positions of a tensor's samples, others in successive ones, which come again after some samples.

    Attributes:
        of: what they follow from: places are equal where this is.
        table: (turns, positions): sample n has those of row n mod turns, counted through its axes but the channels'.
    """

    of: Hashable
    table: NDArray[np.intp] = field(compare=False, repr=False)

    def rows(self, first: int, samples: int) -> NDArray[np.intp]:
        """Of so many samples, the first of which has this number, (samples, positions)."""
        return np.asarray(self.table[(first + np.arange(samples)) % len(self.table)])


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor that a session hands out, whole or reduced inside the graph (see `Statistic.reduction`).

    Attributes:
        tensor: its id.
        reduce: "none", or "minmax": an array [2] (with `axis`, [2, channels]). Of tensors that can't be negative by
            their op (ReLU, sigmoid), a backend may report the minimum as 0.
        axis: channel axis: of a reduction, or of a tensor that is thinned.
        step: with "none": hand out every `step`-th value of each sample, (samples, ⌈size/step⌉), counted with the
            channels first (`axis`), so that it is the same values whatever the layout; see `thinned`.
        places: with "none": hand out all channels (`axis`) at these positions, (samples, channels, positions); of
            sessions that can (`Picking`), see `picked`.
    """

    tensor: TensorId
    reduce: Reduction = "none"
    axis: int | None = None
    step: int = 1
    places: Places | None = None


def picked(values: NDArray[Any], tap: Tap, first: int) -> NDArray[Any]:
    """What a tap with places hands out of a whole tensor, (samples, channels, positions), a new array.

    Args:
        values: the tensor.
        tap: with places; no axis stands for channels on axis 1.
        first: number of the first sample.
    """
    assert tap.places is not None
    seen = np.moveaxis(values, 1 if tap.axis is None else tap.axis, 1)
    flat = seen.reshape(*seen.shape[:2], -1)
    return np.take_along_axis(flat, tap.places.rows(first, len(flat))[:, None], axis=2)


def reduced(values: NDArray[Any], tap: Tap) -> NDArray[Any]:
    """A whole tensor as a tap hands it out: itself, thinned, or its extremes, float32 [2] or [2, channels].

    The extremes of an empty tensor are +∞ and −∞, as those of ranges that have seen nothing.
    """
    if tap.reduce == "none":
        return thinned(values, tap.step, tap.axis)
    axes = None if tap.axis is None else tuple(i for i in range(values.ndim) if i != tap.axis % values.ndim)
    if values.size == 0:
        channels = () if tap.axis is None else values.shape[tap.axis % values.ndim :][:1]
        return np.stack([np.full(channels, np.inf), np.full(channels, -np.inf)]).astype(np.float32)
    return np.stack([values.min(axis=axes), values.max(axis=axes)]).astype(np.float32, copy=False)


def thinned(values: NDArray[Any], step: int, axis: int | None = None) -> NDArray[Any]:
    """Every `step`-th value of each sample, flattened (see `Tap.step`); the tensor itself for step 1."""
    if step == 1:
        return values
    flat = values.reshape(len(values), -1)
    places = thinned_places(values.shape[1:], step, axis)
    return flat[:, ::step] if places is None else flat.take(places, axis=1)


@functools.lru_cache(maxsize=256)
def thinned_places(shape: tuple[int, ...], step: int, axis: int | None) -> NDArray[np.int64] | None:
    """Where the values that `thinned` hands out lie in a flattened sample; None for every `step`-th one in memory.

    Args:
        shape: of one sample.
        step: see `Tap.step`.
        axis: channel axis in the batch, counted from the front; None for no channels.
    """
    if axis in (None, 0, 1) or len(shape) < 2:
        return None
    assert axis is not None
    channels, outer, inner = shape[axis - 1], math.prod(shape[: axis - 1]), math.prod(shape[axis:])
    channel, position = np.divmod(np.arange(0, math.prod(shape), step), outer * inner)
    return np.asarray((position // inner * channels + channel) * inner + position % inner)
