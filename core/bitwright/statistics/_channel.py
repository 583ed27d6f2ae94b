"""Mean and variance of each channel, for bias correction and statistics of normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Reduction
from bitwright.errors import InputError
from bitwright.statistics._base import by_channel, require_finite


class ChannelMoments:
    """Count, mean and variance of each channel over samples and positions.

    Batches are combined by the pairwise update of Chan, Golub & LeVeque (1983), which doesn't cancel where the
    mean is large beside the deviation. Sums are kept in float64.

    Args:
        axis: channel axis; None for one pair of moments over the whole tensor.

    Attributes:
        count: values a channel.
        mean: float64 (channels,), (1,) without an axis.
    """

    reduction: Reduction = "none"

    def __init__(self, axis: int | None = 1) -> None:
        self.axis = axis
        self.count = 0
        self.mean: NDArray[np.float64] = np.zeros(0)
        self._squares: NDArray[np.float64] = np.zeros(0)

    def update(self, *values: NDArray[Any]) -> None:
        """Take one batch.

        Raises:
            InputError: NaN or infinite values, or another number of channels; nothing is taken then.
        """
        (value,) = values
        tensor = np.asarray(value)
        if tensor.size == 0:
            return
        rows = tensor.reshape(1, -1) if self.axis is None else by_channel(tensor, self.axis)
        mean = rows.mean(axis=1, dtype=np.float64)
        require_finite(mean)
        squares = np.empty(len(rows))
        for channel, row in enumerate(rows):
            centred = row - mean[channel]
            squares[channel] = np.dot(centred, centred)
        self._combine(rows.shape[1], mean, squares)

    def _combine(self, count: int, mean: NDArray[np.float64], squares: NDArray[np.float64]) -> None:
        if self.count == 0:
            self.count, self.mean, self._squares = count, mean.copy(), squares.copy()
            return
        if len(mean) != len(self.mean):
            raise InputError(f"{len(mean)} channels after batches with {len(self.mean)}")
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self._squares = self._squares + squares + difference**2 * (self.count * count / total)
        self.count = total

    def merge(self, other: Self) -> None:
        """Take what another instance has seen."""
        if other.count:
            self._combine(other.count, other.mean, other._squares)

    @property
    def variance(self) -> NDArray[np.float64]:
        """Mean squared deviation (divided by the count), float64 (channels,)."""
        if self.count == 0:
            raise InputError("no calibration data reached this tensor")
        return np.asarray(self._squares / self.count)

    def state(self) -> dict[str, NDArray[Any]]:
        """Plain arrays."""
        return {"count": np.array(self.count), "mean": self.mean, "squares": self._squares}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take a saved state."""
        self.count = int(state["count"])
        self.mean, self._squares = np.array(state["mean"]), np.array(state["squares"])
