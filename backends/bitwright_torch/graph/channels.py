"""Which ops tell on which axis their channels lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitwright.graph import Op, OpId, OpKind, TensorId, around

_SECOND = frozenset({OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.BATCH_NORM, OpKind.RESIZE})
_SECOND_TYPES = frozenset({"InstanceNormalization", "GroupNormalization", "MaxPool", "AveragePool",
                           "GlobalAveragePool", "PRelu", "DepthToSpace", "SpaceToDepth"})  # fmt: skip


def told_axes(ops: Sequence[Op], ranks: Mapping[TensorId, int | None]) -> dict[OpId, dict[TensorId, int]]:
    """Convolutions and their like have channels on axis 1."""
    return {
        op.id: {t: 1 for t in around(op) if ranks.get(t) in (2, 3, 4, 5)}
        for op in ops
        if op.kind in _SECOND or op.type in _SECOND_TYPES
    }
