"""On which axis of each activation its channels lie: what backends work out `Tensor.channel_axis` with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bitwright.graph._graph import Op, OpId, OpKind, TensorId

Ranks = Mapping[TensorId, int | None]

_LAST = frozenset({OpKind.LINEAR, OpKind.LAYER_NORM, OpKind.RECURRENT, OpKind.EMBEDDING})
_FIRST = ({OpKind.CONV, OpKind.CONV_TRANSPOSE}, {OpKind.AVERAGE_POOL, OpKind.MAX_POOL})
_KEEPING = frozenset(
    {OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.SOFTMAX, OpKind.ADD, OpKind.MUL,
     OpKind.ELEMENTWISE, OpKind.CONCAT, OpKind.SPLIT, OpKind.SLICE, OpKind.PAD, OpKind.IDENTITY, OpKind.RESIZE,
     OpKind.AVERAGE_POOL, OpKind.MAX_POOL}
)  # fmt: skip


def channel_axes(
    ops: Sequence[Op],
    ranks: Ranks,
    told: Mapping[OpId, Mapping[TensorId, int]],
    orders: Mapping[OpId, Sequence[int]],
) -> dict[TensorId, int]:
    """Channel axis of every activation for which the ops around it tell one.

    Convolutions and their like say where theirs lie (`told`); linear ops, layer norms, recurrent ops and embeddings
    have them last; elementwise ops, pools, resizing and transpositions carry the axis along, forwards and then
    backwards. Where several ops say, a convolution counts first, whose inputs and outputs can't be read without it,
    then a pool, then the first in order: a linear op before a convolution has its features on the last axis all the
    same, and a batch norm says its own.

    Args:
        ops: in topological order.
        ranks: number of dimensions by tensor; None or absent where unknown.
        told: axes (from the front) of the inputs and outputs of ops that have a layout of their own.
        orders: permutation of each transposing op.
    """
    axes: dict[TensorId, int] = {}
    for kinds in _FIRST:
        for op in ops:
            if op.kind in kinds:
                for tensor, axis in told.get(op.id, {}).items():
                    axes.setdefault(tensor, axis)
    for op in ops:
        if op.id in told:
            for tensor, axis in told[op.id].items():
                axes.setdefault(tensor, axis)
        elif op.kind in _LAST:
            for tensor in around(op) if op.kind is not OpKind.EMBEDDING else op.outputs[:1]:
                if rank := ranks.get(tensor):
                    axes.setdefault(tensor, rank - 1)
        if (order := orders.get(op.id)) is not None and op.inputs and op.inputs[0] in axes:
            axes.setdefault(op.output, order.index(axes[op.inputs[0]]))
        elif op.kind in _KEEPING:
            _carry(op.data_inputs, op.outputs, axes, ranks)
    for op in reversed(ops):
        if (order := orders.get(op.id)) is not None and op.data_inputs and op.output in axes:
            axes.setdefault(op.data_inputs[0], order[axes[op.output]])
        elif op.kind in _KEEPING:
            _carry(op.outputs, op.data_inputs, axes, ranks)
    return axes


def around(op: Op) -> tuple[TensorId, ...]:
    """An op's first input, unless that is absent, and its first output."""
    return tuple(t for t in (*op.inputs[:1], *op.outputs[:1]) if t is not None)


def _carry(
    known: Sequence[TensorId], others: Iterable[TensorId], axes: dict[TensorId, int], ranks: Ranks
) -> None:  # fmt: skip
    for tensor in others:
        rank = ranks.get(tensor)
        source = next((t for t in known if t in axes and rank is not None and ranks.get(t) == rank), None)
        if source is not None:
            axes.setdefault(tensor, axes[source])
