"""What every statistic can do: take batches, merge with another of its kind, and travel as plain arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright.graph import TensorId

Source = Literal["float", "simulated"]
Reduction = Literal["none", "minmax"]


@runtime_checkable
class Statistic(Protocol):
    """A mergeable summary of one tensor (or of the same tensor in two networks).

    `reduction` tells the backend what may leave its graph: "none" (the whole tensor) or "minmax"
    (an array [2] or, with `axis`, [2, channels], computed inside the graph).
    """

    reduction: Reduction
    axis: int | None

    def update(self, *values: NDArray[Any]) -> None:
        """Take one batch: the tensors of the request, in its order, or their reductions."""

    def merge(self, other: Self) -> None:
        """Take what another instance has seen; the order of merges doesn't matter beyond rounding."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Plain arrays that `restore` rebuilds it from."""

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Replace what it has seen by a saved state."""


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
    """

    tensor: TensorId
    reduce: Reduction = "none"
    axis: int | None = None
    step: int = 1


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


@dataclass(frozen=True)
class Request:
    """A technique's wish for one statistic.

    Attributes:
        key: the technique's own name for it.
        tensors: the tensors whose batches `update` gets, in order.
        make: builds an empty statistic.
        sources: for each tensor, the network it is taken from.
        memory: bytes that the finished statistic holds, for the pass's budget.
        optional: the technique also works without it; it is left out where there are no data.
    """

    key: str
    tensors: tuple[TensorId, ...]
    make: Callable[[], Statistic]
    sources: tuple[Source, ...] = field(default=("float",))
    memory: int = 0
    optional: bool = False

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.tensors):
            object.__setattr__(self, "sources", self.sources[:1] * len(self.tensors))


def finite(values: Sequence[NDArray[np.floating]]) -> bool:
    """Whether all values are finite (one pass, no temporary of the same size)."""
    return all(bool(np.isfinite(v.min(initial=0)) and np.isfinite(v.max(initial=0))) for v in values)


def require_finite(*extremes: NDArray[np.floating]) -> None:
    """Refuse a batch whose extremes (or means) show a NaN or an infinity.

    Raises:
        InputError: they do.
    """
    if not all(bool(np.isfinite(e).all()) for e in extremes):
        raise InputError(
            "NaN or infinite values; check the calibration data and the model's outputs in float, and "
            "whether the data are scaled as the model expects"
        )


def by_channel(tensor: NDArray[Any], axis: int) -> NDArray[Any]:
    """A tensor as (channels, values of the channel); a view where the layout allows it.

    Raises:
        InputError: the tensor has no such axis.
    """
    if not -tensor.ndim <= axis < tensor.ndim:
        raise InputError(f"channel axis {axis} for a tensor of shape {tensor.shape}")
    return np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
