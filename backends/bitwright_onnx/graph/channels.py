"""Which ops tell on which axis their channels lie."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright.graph import Op, TensorId, around
from bitwright_onnx.graph.operands import slope_axis
from bitwright_onnx.graph.optable import is_default_domain, is_float_constant, linear_weight

_SECOND = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization",
                     "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LRN", "PRelu", "DepthToSpace",
                     "SpaceToDepth"})  # fmt: skip
_LAST = frozenset({"LayerNormalization", "RMSNormalization", "LSTM", "GRU", "RNN"})


def told_axes(op: Op, node: ir.Node, ranks: Mapping[TensorId, int | None]) -> dict[TensorId, int] | None:
    """Convolutions and their like have channels on axis 1, linear ops and layer norms on the last, a PRelu where its
    slopes are broadcast along; None for others."""
    if not is_default_domain(node):
        return None
    if node.op_type == "PRelu" and is_float_constant(node.inputs[1]) and (axis := slope_axis(node)) is not None:
        lengths = {t: ranks.get(t) for t in around(op)}
        return {
            t: 1 if rank is None else rank + axis for t, rank in lengths.items() if rank is None or rank + axis >= 0
        }
    if node.op_type in _SECOND:
        return {t: 1 for t in around(op) if ranks.get(t) in (None, 2, 3, 4, 5)}
    if node.op_type in _LAST or linear_weight(node) is not None:
        return {t: rank - 1 for t in around(op) if (rank := ranks.get(t))}
    return None


def permutation(node: ir.Node) -> list[int] | None:
    """The order of a Transpose; None for other ops, and where the rank isn't known."""
    source = node.inputs[0] if node.op_type == "Transpose" and is_default_domain(node) else None
    if source is None or source.shape is None:
        return None
    backwards = range(len(source.shape) - 1, -1, -1)
    order = [int(i) for i in node.attributes.get_ints("perm", backwards) or backwards]
    if len(order) != len(source.shape):
        raise ModelError(f"node {node.name!r} (Transpose) has an order of {len(order)} axes, {order}, for a tensor of "
                         f"{len(source.shape)}")  # fmt: skip
    return order
