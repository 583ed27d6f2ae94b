"""A sample of a linear op's input columns: for errors that depend on the values themselves, as clipping does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Reduction
from bitwright.errors import InputError
from bitwright.graph import Graph, Op, OpKind, columns, groups_of, input_channels
from bitwright.statistics import LayerMoments, Request, finite


class InputSample:
    """Evenly spaced columns (see `linear_form`) of all that an op is given.

    Every `stride`-th column is kept; when they become too many, every second of them goes and the stride doubles. What
    is kept depends on the data and their order, and not on batches.

    Args:
        op: a convolution, transposed convolution or linear op.
        features: K, the length of a column.
        channel_axis: where the channels of the input lie.
        limit: columns that are kept at most; at least half as many, if so many were seen.
    """

    reduction: Reduction = "none"
    axis: int | None = None

    def __init__(self, op: Op, features: int, channel_axis: int | None = None, *, limit: int = 512) -> None:
        self.op, self.channel_axis, self.limit = op, channel_axis, max(limit, 2)
        self.seen, self.stride = 0, 1
        self._kept: list[NDArray[np.float32]] = []
        self._empty = np.zeros((groups_of(op), features, 0), np.float32)

    @property
    def columns(self) -> NDArray[np.float32]:
        """The columns kept, (groups, K, columns).

        Raises:
            InputError: there were no data.
        """
        if self.seen == 0:
            raise InputError(f"{self.op.id!r}: no calibration data reached this layer")
        return np.concatenate([self._empty, *self._kept], axis=2)

    def update(self, *values: NDArray[Any]) -> None:
        """Take one batch of the op's input.

        Raises:
            InputError: NaN or infinite values; nothing is taken then.
        """
        (value,) = values
        if not finite(values):
            raise InputError(f"{self.op.id!r}: NaN or infinite values reach this layer; check the calibration data")
        for chunk in columns(self.op, value, self.channel_axis):
            first = -self.seen % self.stride
            self.seen += chunk.shape[2]
            self._kept.append(np.ascontiguousarray(chunk[..., first :: self.stride]))
            self._thin()

    def _thin(self) -> None:
        while sum(k.shape[2] for k in self._kept) > self.limit:
            whole = np.concatenate(self._kept, axis=2)
            self._kept = [np.ascontiguousarray(whole[..., ::2])]
            self.stride *= 2

    def merge(self, other: Self) -> None:
        """Take what another instance has kept."""
        while self.stride < other.stride:
            self._kept = [np.concatenate([self._empty, *self._kept], axis=2)[..., ::2]]
            self.stride *= 2
        theirs = np.concatenate([self._empty, *other._kept], axis=2)
        self._kept.append(np.ascontiguousarray(theirs[..., :: self.stride // other.stride]))
        self.seen += other.seen
        self._thin()

    def state(self) -> dict[str, NDArray[Any]]:
        """Plain arrays."""
        kept = np.concatenate([self._empty, *self._kept], axis=2)
        return {"seen": np.array(self.seen), "stride": np.array(self.stride), "columns": kept}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take a saved state."""
        self.seen, self.stride = int(state["seen"]), int(state["stride"])
        self._kept = [np.array(state["columns"], np.float32)]


def input_axis_of(graph: Graph, op: Op) -> int:
    """Where the channels (features) of a linear op's input lie."""
    known = graph.tensors[op.data_inputs[0]]
    if op.kind is OpKind.LINEAR:  # its features, whichever axis the network's channels are on
        return -1 if known.shape is None else len(known.shape) - 1
    return 1 if known.channel_axis is None else known.channel_axis


def features_of(graph: Graph, op: Op) -> int:
    """K of an op with a weight."""
    assert op.weight is not None
    shape = graph.params[op.weight].shape
    return input_channels(op, shape) // groups_of(op) * int(np.prod(shape[2:], dtype=np.int64))


def sample_request(graph: Graph, op: Op, key: str, limit: int, *, or_moments: bool = False) -> Request:
    """A request for a sample of an op's input in the float network; with `or_moments`, moments serve in its place."""
    features, axis = features_of(graph, op), input_axis_of(graph, op)
    return Request(
        key,
        (op.data_inputs[0],),
        partial(InputSample, op, features, axis, limit=limit),
        memory=4 * groups_of(op) * features * limit,
        instead=partial(LayerMoments, op, features, axis, paired=False) if or_moments else None,
    )
