"""On which axis of each activation its channels lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitwright.graph import OpKind, TensorId
from bitwright_tensorflow.found import Found

_LAST = frozenset({OpKind.LINEAR, OpKind.LAYER_NORM, OpKind.EMBEDDING})
_KEEPING = frozenset(
    {OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.SOFTMAX, OpKind.ADD, OpKind.MUL,
     OpKind.ELEMENTWISE, OpKind.CONCAT, OpKind.SPLIT, OpKind.SLICE, OpKind.PAD, OpKind.IDENTITY, OpKind.RESIZE,
     OpKind.AVERAGE_POOL, OpKind.MAX_POOL}
)  # fmt: skip


def channel_axes(ops: Sequence[Found], ranks: Mapping[TensorId, int | None]) -> dict[TensorId, int]:
    """Channel axis of every activation for which the ops around it tell one.

    Convolutions and their like say where theirs lie (`Found.channels`), linear ops, layer norms and embeddings have
    them last; elementwise ops, pools and transpositions carry the axis along, forwards and then backwards.

    Args:
        ops: in topological order.
        ranks: number of dimensions by tensor.
    """
    axes: dict[TensorId, int] = {}
    for op in ops:
        for tensor, axis in op.channels.items():
            axes.setdefault(tensor, axis)
        if not op.channels and op.kind in _LAST:
            around = (*op.inputs[:1], *op.outputs[:1]) if op.kind is not OpKind.EMBEDDING else op.outputs[:1]
            for tensor in around:
                if rank := ranks.get(tensor):
                    axes.setdefault(tensor, rank - 1)
        elif op.kind is OpKind.TRANSPOSE and op.order is not None and op.inputs and op.inputs[0] in axes:
            axes.setdefault(op.outputs[0], op.order.index(axes[op.inputs[0]]))
        elif op.kind in _KEEPING:
            _carry(op.inputs, op.outputs, axes, ranks)
    for op in reversed(ops):
        if op.kind is OpKind.TRANSPOSE and op.order is not None and op.inputs and op.outputs[0] in axes:
            axes.setdefault(op.inputs[0], op.order[axes[op.outputs[0]]])
        elif op.kind in _KEEPING:
            _carry(op.outputs, op.inputs, axes, ranks)
    return axes


def _carry(
    known: Sequence[TensorId], others: Sequence[TensorId], axes: dict[TensorId, int],
    ranks: Mapping[TensorId, int | None],
) -> None:  # fmt: skip
    for tensor in others:
        rank = ranks.get(tensor)
        source = next((t for t in known if t in axes and rank is not None and ranks.get(t) == rank), None)
        if source is not None:
            axes.setdefault(tensor, axes[source])
