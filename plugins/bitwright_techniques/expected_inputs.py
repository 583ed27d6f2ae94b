"""Means of activations without data, from the batch norms that were folded: a channel's output is about N(β, γ²).

Carried through clips by the moments of a clipped normal distribution, through sums of branches (taken as
independent), concatenation, pooling and flattening (Nagel et al. 2019, §4.2.1 and appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import (
    LINEAR_KINDS,
    ActivationAttrs,
    AxisAttrs,
    ConvAttrs,
    Graph,
    Op,
    OpId,
    OpKind,
    TensorId,
    groups_of,
    input_channels,
)

Values = NDArray[np.float64]
Moments = tuple[Values, Values]
"""Mean and standard deviation of each channel; scalars where all channels are alike."""


def clipped_normal(mean: Values, std: Values, low: float = -math.inf, high: float = math.inf) -> Moments:
    """Mean and standard deviation of clip(x, low, high) for x ~ N(mean, std²).

    With α = (low − μ)/σ, β = (high − μ)/σ: E = μ·(Φ(β) − Φ(α)) + σ·(φ(α) − φ(β)) + low·Φ(α) + high·(1 − Φ(β)).
    """
    mean, std = np.broadcast_arrays(np.asarray(mean, np.float64), np.asarray(std, np.float64))
    spread = np.maximum(std, 1e-30)
    a, b = (low - mean) / spread, (high - mean) / spread
    below, above, inside = _cdf(a), _cdf(-b), _cdf(b) - _cdf(a)
    first, second = mean * inside + spread * (_pdf(a) - _pdf(b)), (mean**2 + spread**2) * inside
    edge = 2 * mean * spread * (_pdf(a) - _pdf(b))
    second = second + edge + spread**2 * (_times_pdf(a) - _times_pdf(b))
    for bound, mass in ((low, below), (high, above)):
        if math.isfinite(bound):
            first, second = first + bound * mass, second + bound**2 * mass
    return first, np.sqrt(np.maximum(second - first**2, 0.0))


def _pdf(z: Values) -> Values:
    return np.asarray(np.exp(-0.5 * np.square(z)) / math.sqrt(2 * math.pi))


def _times_pdf(z: Values) -> Values:
    return np.where(np.isfinite(z), z, 0.0) * _pdf(z)


def _cdf(z: Values) -> Values:
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z.reshape(-1).tolist()]).reshape(z.shape)


class ExpectedInputs:
    """Expected inputs of a graph's linear ops.

    Args:
        graph: the graph.
        folded: (γ, β) of the batch norms that linear ops have absorbed.
    """

    def __init__(self, graph: Graph, folded: Mapping[OpId, tuple[NDArray[np.floating], NDArray[np.floating]]]) -> None:
        self.graph, self.folded = graph, folded
        self._known: dict[TensorId, Moments | None] = {}
        for op in graph.ops:
            for tensor in op.outputs:
                self._known[tensor] = self._after(op) if len(op.outputs) == 1 else None

    def columns(self, op: Op) -> Values | None:
        """E[x] of the op's columns, (groups, K); None where it can't be told. Padding is ignored, as in the paper."""
        known = self._of(op.data_inputs[0])
        if known is None or op.weight is None or not self._on_features(op, op.data_inputs[0]):
            return None
        shape = self.graph.params[op.weight].shape
        channels, groups = input_channels(op, shape), groups_of(op)
        mean = np.broadcast_to(known[0], (channels,)) if known[0].size in (1, channels) else None
        if mean is None:
            return None
        taps = 1 if op.kind is OpKind.LINEAR else int(np.prod(shape[2:]))
        if op.kind is OpKind.CONV_TRANSPOSE and isinstance(op.attrs, ConvAttrs):
            mean = mean / np.prod(op.attrs.strides)  # the zeros between the elements
        return np.repeat(mean.reshape(groups, -1), taps, axis=1)

    def _of(self, tensor: TensorId) -> Moments | None:
        if tensor in self.graph.inputs:  # taken as standardized, as the paper does
            return np.zeros(1), np.ones(1)
        return self._known.get(tensor)

    def _after(self, op: Op) -> Moments | None:
        if op.kind in LINEAR_KINDS:
            if op.id not in self.folded or not self._on_features(op, op.output):
                return None
            gamma, beta = self.folded[op.id]
            return np.asarray(beta, np.float64), np.abs(np.asarray(gamma, np.float64))
        sources = [self._of(t) for t in op.data_inputs]
        known = [m for m in sources if m is not None]
        if not known or len(known) < len(sources):
            return None
        return self._through(op, known)

    def _through(self, op: Op, known: list[Moments]) -> Moments | None:
        mean, std = known[0]
        keeps = op.kind not in (OpKind.RESHAPE, OpKind.AVERAGE_POOL)
        if keeps and any(self._axis(t) != self._axis(op.output) for t in op.data_inputs):
            return None
        if op.kind is OpKind.IDENTITY:
            return mean, std
        if op.kind in (OpKind.RELU, OpKind.CLIPPED_RELU):
            clipped = op.kind is OpKind.CLIPPED_RELU and isinstance(op.attrs, ActivationAttrs)
            attrs = op.attrs if clipped else ActivationAttrs(0.0, None)
            assert isinstance(attrs, ActivationAttrs)
            low = -math.inf if attrs.minimum is None else attrs.minimum
            high = math.inf if attrs.maximum is None else attrs.maximum
            return clipped_normal(mean, std, low, high) if np.isfinite(std).all() else None
        if op.kind is OpKind.ADD and len(known) == 2 and not op.params:
            total = sum((m for m, _ in known), np.zeros(1))
            return total, np.sqrt(sum((s**2 for _, s in known), np.zeros(1)))
        if op.kind is OpKind.CONCAT:
            return self._joined(op, known)
        if op.kind is OpKind.AVERAGE_POOL:  # how far neighbours vary together is unknown, so the spread is too
            return mean, np.full_like(std, np.nan)
        if op.kind is OpKind.RESHAPE:
            return self._flattened(op, mean, std)
        return None

    def _on_features(self, op: Op, tensor: TensorId) -> bool:
        """Whether an op has its features where the tensor's channels lie: a linear op on the last axis alone."""
        place = self._axis(tensor)
        return op.kind is not OpKind.LINEAR or place is None or place[0] == place[1] - 1

    def _axis(self, tensor: TensorId) -> tuple[int, int] | None:
        known = self.graph.tensors[tensor]
        if known.shape is None:
            return None
        return (1 if known.channel_axis is None else known.channel_axis) % len(known.shape), len(known.shape)

    def _joined(self, op: Op, known: list[Moments]) -> Moments | None:
        place = self._axis(op.output)
        on_channels = place is not None and isinstance(op.attrs, AxisAttrs) and op.attrs.axis % place[1] == place[0]
        if not on_channels or op.params or any(m.size == 1 for m, _ in known):
            return None
        return np.concatenate([m for m, _ in known]), np.concatenate([s for _, s in known])

    def _flattened(self, op: Op, mean: Values, std: Values) -> Moments | None:
        place, after = self._axis(op.data_inputs[0]), self.graph.tensors[op.output].shape
        before = self.graph.tensors[op.data_inputs[0]].shape
        if place is None or before is None or after is None or len(after) != 2 or place[0] not in (1, place[1] - 1):
            return None
        spatial = [n for i, n in enumerate(before) if i not in (0, place[0])]
        features = after[1]
        if mean.size == 1:
            return mean, std
        if features is None or features % mean.size:
            return None
        times = features // mean.size
        known = [n for n in spatial if n is not None]
        if times != int(np.prod(known)) if len(known) == len(spatial) else op.type != "Flatten":
            return None
        spread = np.repeat if place[0] == 1 else np.tile
        return spread(mean, times), spread(std, times)
