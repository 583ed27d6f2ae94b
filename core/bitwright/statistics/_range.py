"""Smallest and largest value of a tensor or of each of its channels: all that min-max calibration needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Reduction
from bitwright.errors import InputError
from bitwright.statistics._base import by_channel, require_finite


class RangeStatistic:
    """Exact running minimum and maximum.

    Args:
        axis: channel axis; None for one range over the whole tensor.
        reduction: what `update` is given. "minmax" (default): the pair that the backend reduced inside its graph,
            shape (2,), or (2, channels) with `axis`. "none": whole tensors.

    Attributes:
        low, high: float64, () or (channels,); +inf and −inf before the first update.
    """

    def __init__(self, axis: int | None = None, *, reduction: Reduction = "minmax") -> None:
        self.reduction: Reduction = reduction
        self.axis = axis
        self.low = np.array(np.inf)
        self.high = np.array(-np.inf)

    def update(self, *values: NDArray[Any]) -> None:
        """Take one batch, as `reduction` says.

        Raises:
            InputError: NaN or infinite values, or a reduced pair of the wrong shape; nothing is taken then.
        """
        (value,) = values
        if self.reduction == "none":
            return self.observe(value)
        pair = np.asarray(value, np.float64)
        if pair.ndim != (1 if self.axis is None else 2) or len(pair) != 2:
            expected = "(2,)" if self.axis is None else "(2, channels)"
            raise InputError(f"a reduced range has shape {expected}, got {pair.shape}")
        if not _empty(pair):
            self._take(pair[0], pair[1])
        return None

    def observe(self, tensor: NDArray[Any]) -> None:
        """Take one batch as a whole tensor, whatever `reduction` is.

        Raises:
            InputError: as `update`.
        """
        if tensor.size == 0:
            return
        if self.axis is None:
            self._take(np.asarray(tensor.min(), np.float64), np.asarray(tensor.max(), np.float64))
        else:
            rows = by_channel(tensor, self.axis)
            self._take(rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64))

    def _take(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        require_finite(low, high)
        if self.low.ndim == low.ndim and self.low.shape != low.shape:
            raise InputError(f"{low.size} channels after batches with {self.low.size}")
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    def merge(self, other: Self) -> None:
        """Take what another instance has seen."""
        if other.seen:
            self._take(other.low, other.high)

    @property
    def seen(self) -> bool:
        """Whether any value was taken."""
        return bool((self.low <= self.high).all())

    def state(self) -> dict[str, NDArray[Any]]:
        """Plain arrays."""
        return {"low": self.low, "high": self.high}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take a saved state."""
        self.low, self.high = np.array(state["low"], np.float64), np.array(state["high"], np.float64)


def _empty(pair: NDArray[np.float64]) -> bool:
    """Whether extremes are those of nothing: +∞ below −∞, or in single precision its extremes."""
    return bool((pair[0] > pair[1]).all())
