"""What every statistic can do: take batches, merge with another of its kind, and travel as plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Reduction
from bitwright.errors import InputError
from bitwright.graph import TensorId

Source = Literal["float", "simulated"]


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
        instead: builds what else will do, under the same key, where there are no data but a bank, which has no values
            to sample: `LayerMoments` in place of columns of a layer's input.
    """

    key: str
    tensors: tuple[TensorId, ...]
    make: Callable[[], Statistic]
    sources: tuple[Source, ...] = field(default=("float",))
    memory: int = 0
    optional: bool = False
    instead: Callable[[], Statistic] | None = None

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
