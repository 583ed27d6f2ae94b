"""On which axis of each activation its channels lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitwright.graph import Op, OpId, OpKind, TensorId

_KEEPING = frozenset(
    {OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.SOFTMAX, OpKind.ADD, OpKind.MUL,
     OpKind.ELEMENTWISE, OpKind.CONCAT, OpKind.SPLIT, OpKind.SLICE, OpKind.PAD, OpKind.IDENTITY,
     OpKind.AVERAGE_POOL, OpKind.MAX_POOL}
)  # fmt: skip


def channel_axes(
    ops: Sequence[Op],
    ranks: Mapping[TensorId, int],
    own: Mapping[OpId, int],
    orders: Mapping[OpId, tuple[int, ...]],
) -> dict[TensorId, int]:
    """Channel axis of every activation for which the ops around it tell one.

    Layers with a data format, norms and dense layers tell their own; elementwise ops, pools and transpositions carry
    the axis along, forwards and then backwards.

    Args:
        ops: in topological order.
        ranks: number of dimensions by tensor.
        own: the axis (from the front) on which an op's channels lie, of its first input and output alike.
        orders: permutation of each transposing op.
    """
    axes: dict[TensorId, int] = {}
    for op in ops:
        around = [t for t in (*op.data_inputs[:1], *op.outputs[:1]) if t in ranks]
        if op.id in own:
            for t in around[-1:] if op.kind is OpKind.EMBEDDING else around:
                if own[op.id] < ranks[t]:
                    axes.setdefault(t, own[op.id])
        elif op.kind is OpKind.LINEAR:
            for t in around:
                axes.setdefault(t, ranks[t] - 1)
        else:
            _carry(op, axes, ranks, orders)
    for op in reversed(ops):
        _carry_back(op, axes, ranks, orders)
    return axes


def _carry(
    op: Op, axes: dict[TensorId, int], ranks: Mapping[TensorId, int], orders: Mapping[OpId, tuple[int, ...]]
) -> None:
    if op.kind is OpKind.TRANSPOSE:
        if op.data_inputs and op.data_inputs[0] in axes and (order := orders.get(op.id)) is not None:
            axes.setdefault(op.output, order.index(axes[op.data_inputs[0]]))
    elif op.kind in _KEEPING:
        for result in op.outputs:
            known = next((t for t in op.data_inputs if t in axes and ranks.get(t) == ranks.get(result)), None)
            if known is not None:
                axes.setdefault(result, axes[known])


def _carry_back(
    op: Op, axes: dict[TensorId, int], ranks: Mapping[TensorId, int], orders: Mapping[OpId, tuple[int, ...]]
) -> None:
    known = next((t for t in op.outputs if t in axes), None)
    if known is None:
        return
    if op.kind is OpKind.TRANSPOSE and op.data_inputs:
        if (order := orders.get(op.id)) is not None:
            axes.setdefault(op.data_inputs[0], order[axes[known]])
    elif op.kind in _KEEPING:
        for t in op.data_inputs:
            if ranks.get(t) == ranks.get(known):
                axes.setdefault(t, axes[known])
