"""What a node computes, as the canonical graph says it (`Op.call`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir

from bitwright.graph import AttributeValue, Call, Constant, ParamId, ParamRole
from bitwright_onnx.graph.operands import slope_axis
from bitwright_onnx.graph.optable import is_default_domain
from bitwright_onnx.graph.tensors import tensor_array

_DEFAULTS: Mapping[str, Mapping[str, AttributeValue]] = {
    "LayerNormalization": {"axis": -1, "epsilon": 1e-5},
    "RMSNormalization": {"axis": -1, "epsilon": 1e-5},
    "InstanceNormalization": {"epsilon": 1e-5},
    "GroupNormalization": {"epsilon": 1e-5},
    "LpNormalization": {"axis": -1, "p": 2},
    "HardSigmoid": {"alpha": 0.2},
    "Pad": {"mode": "constant"},
    "DepthToSpace": {"mode": "DCR"},
    "Resize": {"mode": "nearest", "coordinate_transformation_mode": "half_pixel"},
}
"""What canonical ops always say, or mean otherwise where they don't."""
_SCALARS = {ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING}
_LISTS = {ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS}


def call_of(node: ir.Node, roles: Mapping[ParamRole, ParamId], unseen: Collection[ir.Value]) -> Call | None:
    """The node's attributes and constant operands; None where these aren't all there is to it.

    Args:
        node: of any operator.
        roles: its parameters.
        unseen: values that the canonical graph doesn't show.
    """
    if not is_default_domain(node) or any(a.type not in _SCALARS | _LISTS for a in node.attributes.values()):
        return None
    if any(v in unseen for v in node.inputs if v is not None):
        return None
    given = [bool(o.name) for o in node.outputs]
    if given != sorted(given, reverse=True) and node.op_type not in ("LSTM", "GRU", "RNN"):
        return None  # outputs have no places there
    attributes: dict[str, Any] = dict(_DEFAULTS.get(node.op_type, {}))
    for name, held in node.attributes.items():
        attributes[name] = tuple(held.value) if held.type in _LISTS else held.value
    names = {param: role for role, param in roles.items()}
    operands: dict[int, Constant | ParamRole] = {}
    for index, value in enumerate(node.inputs):
        if value is None or not value.is_initializer() or value.const_value is None:
            continue
        role = names.get(str(value.name))
        operands[index] = Constant(tensor_array(value.const_value)) if role is None else role
    axes = attributes.pop("axes", None) if node.op_type.startswith("Reduce") else None
    if node.op_type.startswith("Reduce"):
        attributes.setdefault("keepdims", 1)
        if axes is not None:
            operands[1] = Constant(axes)
    if node.op_type == "DFT" and "axis" in attributes:  # an operand from opset 20 on
        operands[2] = Constant(attributes.pop("axis"))
    if node.op_type == "Transpose" and "perm" not in attributes and node.inputs[0] is not None:
        shape = node.inputs[0].shape
        if shape is None:
            return None
        attributes["perm"] = tuple(reversed(range(len(shape))))
    if node.op_type == "PRelu" and ParamRole.SLOPE in roles and (axis := slope_axis(node)) is not None:
        attributes["channel_axis"] = axis  # its canonical form is one number a channel, wherever it is broadcast along
    return Call(attributes, operands)
