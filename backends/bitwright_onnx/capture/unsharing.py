"""Initializers that an exporter has merged because their values are equal, and that are parameters of different kinds.

PyTorch's exporter writes one array of zeros for the biases of linear layers and the shifts of norms. They are no
shared parameter: a target gives the one an int32 grid and keeps the other in float.
A matrix that one op reads as its weight and another as a constant (an embedding that an Einsum multiplies by) is one
parameter, as long as both read it in one layout.
"""

from __future__ import annotations

import onnx_ir as ir

from bitwright.graph import Param, ParamRole
from bitwright_onnx.graph.initializers import add_initializer
from bitwright_onnx.graph.operands import describe, parameters
from bitwright_onnx.graph.optable import bias_add
from bitwright_onnx.graph.tensors import tensor_array

LARGEST = 2**20
"""Bytes of an initializer that may be written twice; larger ones are matrices, which are shared on purpose."""
_SAME = frozenset({ParamRole.WEIGHT, ParamRole.BIAS, ParamRole.CONSTANT})
"""Roles that are treated alike whatever the op's type."""
_MATRIX = frozenset({ParamRole.WEIGHT, ParamRole.CONSTANT})
"""Roles that a shared matrix may have both of: it has one grid in both."""


def unshare_roles(graph: ir.Graph) -> None:
    """Give each kind of use a copy of its own; the first keeps the name."""
    first: dict[ir.Value, tuple[ParamRole, str]] = {}
    shown: dict[ir.Value, Param] = {}
    copies: dict[tuple[ir.Value, ParamRole, str], ir.Value] = {}
    merged: set[ir.Node] = set()
    for node in list(graph):
        if node in merged:
            continue
        if (add := bias_add(node)) is not None:
            merged.add(add)  # a part of the product: its constant is the bias
        for role, (owner, index) in parameters(node).items():
            value = owner.inputs[index]
            assert value is not None and value.const_value is not None
            use = role, "" if role in _SAME else node.op_type
            known, param = first.setdefault(value, use), describe(owner, role, value)
            alike = shown.setdefault(value, param) == param
            tied = alike and {known[0], role} <= _MATRIX and len(param.shape) > 1
            if known == use or tied or value.const_value.nbytes > LARGEST:
                continue
            if (value, *use) not in copies:
                array = tensor_array(value.const_value)
                copies[value, *use] = add_initializer(graph, f"{value.name}.{node.name}", array, value.dtype)
            owner.replace_input_with(index, copies[value, *use])
