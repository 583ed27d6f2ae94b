"""How unevenly channels use the ranges of their weights, and what equalization across layers would give back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Params
from bitwright.graph import Graph, Op, OpKind, downstream, groups_of, input_channels, kind, to_matrix
from bitwright.grids import Encoding
from bitwright_analysis.records import Imbalance

SCALES_THROUGH = kind(
    OpKind.RELU,
    OpKind.CLIPPED_RELU,
    OpKind.PRELU,
    OpKind.IDENTITY,
    OpKind.BATCH_NORM,
    OpKind.AVERAGE_POOL,
    OpKind.MAX_POOL,
    OpKind.PAD,
)
"""Ops between two layers that leave channels apart."""


def imbalances(graph: Graph, table: Mapping[str, Encoding], params: Params) -> list[Imbalance]:
    """Every layer with a weight of two channels or more, in the order of the network."""
    found = []
    for op in graph.linear_ops:
        assert op.weight is not None
        own = output_ranges(op, np.asarray(params[op.weight]))
        alive = own[own > 0]
        if len(own) < 2 or not len(alive):
            continue
        encoding = table.get(op.weight)
        row = Imbalance(
            op=op.id,
            ratio=float(alive.max() / np.median(alive)),
            depthwise=graph.is_depthwise(op),
            per_channel=encoding is not None and encoding.scale.ndim > 0,
        )
        follower = downstream(graph, op, SCALES_THROUGH)
        if follower is not None and follower.weight is not None and follower in graph.linear_ops:
            other = input_ranges(follower, np.asarray(params[follower.weight]))
            if len(other) == len(own):
                before, after = precision(own, other), precision(*equalized(own, other))
                row = row.model_copy(update={"follower": follower.id, "precision": before, "equalized": after})
        found.append(row)
    return found


def output_ranges(op: Op, weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Largest magnitude in each output channel."""
    matrix = np.abs(to_matrix(op, weight)).max(axis=2)
    return np.asarray(matrix.reshape(-1), np.float64)


def input_ranges(op: Op, weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Largest magnitude of what is multiplied with each input channel."""
    channels, groups = input_channels(op, weight.shape), groups_of(op)
    matrix = to_matrix(op, weight).reshape(groups, -1, channels // groups, weight[0, 0].size)
    return np.asarray(np.abs(matrix).max(axis=(1, 3)).reshape(-1), np.float64)


def precision(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Mean of (r₁/max r₁)·(r₂/max r₂) over the channels: eq. 6 of Nagel et al. 2019, for a mean instead of a sum."""
    top = max(first.max(), 1e-30), max(second.max(), 1e-30)
    return float(np.mean(first / top[0] * (second / top[1])))


def equalized(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ranges after scaling channels so that both layers have √(r₁·r₂) (eq. 11); dead channels stay as they are."""
    even = np.sqrt(first * second)
    dead = even == 0
    return np.where(dead, first, even), np.where(dead, second, even)
