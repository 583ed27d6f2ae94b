"""How far each channel reaches towards the upper bound of a clipped ReLU: from data, or from folded batch norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import ActivationAttrs, Graph, Op, OpKind, TensorId, output_channels
from bitwright.statistics import RangeStatistic, Request
from bitwright.technique import Context
from bitwright_techniques.channel_chains import ClipRule, bounded, find_chains

DEVIATIONS = 4.0
"""A channel that is N(β, γ²) is taken to reach β + 4·|γ|."""

NEAR = 1.0 + 1e-9
"""Shares up to here count as reaching the bound and not beyond it."""


def clip_requests(graph: Graph, pooling: bool, *, optional: bool) -> Iterable[Request]:
    """Ranges by channel before every clipped ReLU that lies between equalizable layers."""
    sets = find_chains(graph, lambda op: True, lambda tensor: True, pooling=pooling)
    for clip in (op for chain in sets for link in chain for op in link.between if bounded(op)):
        source = clip.data_inputs[0]
        axis = _channel_axis(graph, source)
        yield Request(_key(clip), (source,), lambda axis=axis: RangeStatistic(axis), optional=optional)  # type: ignore[misc]


def clip_rule(ctx: Context[Any]) -> ClipRule:
    """Which clipped ReLUs equalization goes through, by the setting `clipped_relu`."""
    mode = ctx.settings.clipped_relu
    if mode in ("replace", "stop"):
        return lambda first, clip: mode == "replace"
    return lambda first, clip: reach(ctx, first, clip) is not None


def reach(ctx: Context[Any], first: Op, clip: Op) -> NDArray[np.float64] | None:
    """Largest value of each channel of `first` before the clip, as a share of the bound; above 1 it is cut.

    None where neither data nor a folded batch norm tell.
    """
    assert isinstance(clip.attrs, ActivationAttrs)
    assert first.weight is not None
    bound = clip.attrs.maximum
    if bound is None or bound <= 0:
        return None
    channels = output_channels(first, ctx.graph.params[first.weight].shape)
    measured = ctx.statistics.get(_key(clip))
    if isinstance(measured, RangeStatistic):
        high = measured.high
    elif first.id in ctx.folded and ctx.settings.clipped_relu == "auto":
        gamma, beta = (np.asarray(v, np.float64) for v in ctx.folded[first.id])
        high = beta + DEVIATIONS * np.abs(gamma)
    else:
        return None
    if high.shape != (channels,) or not np.isfinite(high).all():
        return None
    share = np.maximum(high, 0.0) / bound
    return np.asarray(np.where(share <= NEAR, np.minimum(share, 1.0), share))


def _key(clip: Op) -> str:
    return f"reach/{clip.id}"


def _channel_axis(graph: Graph, tensor: TensorId) -> int:
    known = graph.tensors[tensor]
    producer = graph.producer(tensor)
    if producer is not None and producer.kind is OpKind.LINEAR and known.shape is not None:
        return len(known.shape) - 1  # its features, wherever others have the tensor's channels
    return 1 if known.channel_axis is None else known.channel_axis
