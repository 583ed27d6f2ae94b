"""On which axis of each activation its channels lie."""

from __future__ import annotations

import onnx_ir as ir

from bitwright.graph import OpKind
from bitwright_onnx.optable import KINDS, is_default_domain, linear_weight

_SECOND = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
                     "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LRN", "PRelu", "DepthToSpace",
                     "SpaceToDepth"})  # fmt: skip
_LAST = frozenset({"LayerNormalization", "RMSNormalization", "LSTM", "GRU", "RNN"})
_KEEPING = frozenset(
    {OpKind.RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.SOFTMAX, OpKind.ADD, OpKind.MUL, OpKind.ELEMENTWISE,
     OpKind.CONCAT, OpKind.SPLIT, OpKind.RESIZE, OpKind.SLICE, OpKind.PAD, OpKind.IDENTITY, OpKind.AVERAGE_POOL,
     OpKind.MAX_POOL}
)  # fmt: skip


def channel_axes(graph: ir.Graph) -> dict[ir.Value, int]:
    """Channel axis of every activation for which the ops around it tell one.

    Convolutions and their like have channels on axis 1, linear ops and layer norms on the last; elementwise ops,
    pools and transpositions carry the axis along, forwards and then backwards.
    """
    axes: dict[ir.Value, int] = {}
    nodes = [node for node in graph if is_default_domain(node)]
    for node in nodes:
        source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type in _SECOND:
            for value in (source, result):
                if value is not None and _rank(value) in (None, 2, 3, 4, 5):
                    axes.setdefault(value, 1)
        elif node.op_type in _LAST or linear_weight(node) is not None:
            for value in (source, result):
                if value is not None and (rank := _rank(value)):
                    axes.setdefault(value, rank - 1)
        else:
            _carry(node, axes)
    for node in reversed(nodes):
        _carry_back(node, axes)
    return {value: axis for value, axis in axes.items() if not value.is_initializer()}


def _rank(value: ir.Value) -> int | None:
    return len(value.shape) if value.shape is not None else None


def _permutation(node: ir.Node) -> list[int] | None:
    rank = _rank(node.inputs[0]) if node.inputs[0] is not None else None
    if rank is None:
        return None
    return [int(i) for i in node.attributes.get_ints("perm", range(rank - 1, -1, -1)) or range(rank - 1, -1, -1)]


def _carry(node: ir.Node, axes: dict[ir.Value, int]) -> None:
    if node.op_type == "Transpose" and node.inputs[0] in axes:
        if (order := _permutation(node)) is not None:
            axes.setdefault(node.outputs[0], order.index(axes[node.inputs[0]]))
    elif KINDS.get(node.op_type) in _KEEPING:
        for result in node.outputs:
            rank = _rank(result)
            source = next((v for v in node.inputs if v in axes and rank is not None and _rank(v) == rank), None)
            if source is not None:
                axes.setdefault(result, axes[source])


def _carry_back(node: ir.Node, axes: dict[ir.Value, int]) -> None:
    known = next((o for o in node.outputs if o in axes), None)
    if known is None:
        return
    if node.op_type == "Transpose" and node.inputs[0] is not None:
        if (order := _permutation(node)) is not None:
            axes.setdefault(node.inputs[0], order[axes[known]])
    elif KINDS.get(node.op_type) in _KEEPING:
        rank = _rank(known)
        for value in node.inputs:
            if value is not None and rank is not None and _rank(value) == rank:
                axes.setdefault(value, axes[known])
