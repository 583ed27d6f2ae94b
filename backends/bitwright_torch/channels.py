"""On which axis of each activation its channels lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitwright.graph import Op, OpId, OpKind, TensorId

_SECOND = frozenset({OpKind.CONV, OpKind.CONV_TRANSPOSE, OpKind.BATCH_NORM, OpKind.RESIZE})
_SECOND_TYPES = frozenset({"InstanceNormalization", "GroupNormalization", "MaxPool", "AveragePool",
                           "GlobalAveragePool", "PRelu", "DepthToSpace", "SpaceToDepth"})  # fmt: skip
_LAST = frozenset({OpKind.LINEAR, OpKind.LAYER_NORM, OpKind.RECURRENT, OpKind.EMBEDDING})
_KEEPING = frozenset(
    {OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.SOFTMAX, OpKind.ADD, OpKind.MUL,
     OpKind.ELEMENTWISE, OpKind.CONCAT, OpKind.SPLIT, OpKind.SLICE, OpKind.PAD, OpKind.IDENTITY,
     OpKind.AVERAGE_POOL, OpKind.MAX_POOL}
)  # fmt: skip


def channel_axes(
    ops: Sequence[Op], ranks: Mapping[TensorId, int | None], orders: Mapping[OpId, tuple[int, ...]]
) -> dict[TensorId, int]:
    """Channel axis of every activation for which the ops around it tell one.

    Convolutions and their like have channels on axis 1, linear ops, layer norms and embeddings on the last;
    elementwise ops, pools and transpositions carry the axis along, forwards and then backwards.

    Args:
        ops: in topological order.
        ranks: number of dimensions by tensor.
        orders: permutation of each transposing op.
    """
    axes: dict[TensorId, int] = {}
    for op in ops:
        first = op.inputs[0] if op.inputs else None
        around = [t for t in (first, *op.outputs[:1]) if t is not None]
        if op.kind in _SECOND or op.type in _SECOND_TYPES:
            for t in around:
                if ranks.get(t) in (2, 3, 4, 5):
                    axes.setdefault(t, 1)
        elif op.kind in _LAST:
            for t in around if op.kind is not OpKind.EMBEDDING else op.outputs[:1]:
                if rank := ranks.get(t):
                    axes.setdefault(t, rank - 1)
        else:
            _carry(op, axes, ranks, orders)
    for op in reversed(ops):
        _carry_back(op, axes, ranks, orders)
    return axes


def _carry(
    op: Op, axes: dict[TensorId, int], ranks: Mapping[TensorId, int | None], orders: Mapping[OpId, tuple[int, ...]]
) -> None:
    if op.kind is OpKind.TRANSPOSE:
        source = op.data_inputs[0] if op.data_inputs else None
        if source in axes and (order := orders.get(op.id)) is not None:
            axes.setdefault(op.output, order.index(axes[source]))
    elif op.kind in _KEEPING:
        for result in op.outputs:
            rank = ranks.get(result)
            known = next((t for t in op.data_inputs if t in axes and rank is not None and ranks.get(t) == rank), None)
            if known is not None:
                axes.setdefault(result, axes[known])


def _carry_back(
    op: Op, axes: dict[TensorId, int], ranks: Mapping[TensorId, int | None], orders: Mapping[OpId, tuple[int, ...]]
) -> None:
    known = next((t for t in op.outputs if t in axes), None)
    if known is None:
        return
    if op.kind is OpKind.TRANSPOSE and op.data_inputs:
        if (order := orders.get(op.id)) is not None:
            axes.setdefault(op.data_inputs[0], order[axes[known]])
    elif op.kind in _KEEPING:
        rank = ranks.get(known)
        for t in op.data_inputs:
            if rank is not None and ranks.get(t) == rank:
                axes.setdefault(t, axes[known])
