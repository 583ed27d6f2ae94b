"""What ONNX's converter gets wrong in models of opset 6 and older: the axis at which a second operand is broadcast."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from bitwright.errors import ModelError
from bitwright_onnx.graph.initializers import rewrite_operand

NUMPY_BROADCASTING = 7
"""From this opset on operands are broadcast as numpy does."""
_BROADCAST = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less"})


def broadcast_as_numpy(model: ir.Model) -> None:
    """Give second operands the axes that numpy needs, in place: `axis` of opset 6, and a PRelu's slope a channel.

    Raises:
        ModelError: a rank that decides it isn't known.
    """
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for node in list(model.graph):
        if node.op_type == "PRelu":
            _align(model.graph, node, 1)
        elif node.op_type in _BROADCAST and node.attributes.get_int("broadcast", False):
            given = node.attributes.get_int("axis")
            axis = -1 if given is None else int(given)
            node.attributes.pop("axis", None)
            if axis >= 0:
                _align(model.graph, node, axis)


def _align(graph: ir.Graph, node: ir.Node, axis: int) -> None:
    """Put axes of length 1 behind the second operand, so that its first one meets axis `axis` of the first."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None or first.shape is None or second.shape is None:
        raise ModelError(
            f"node {node.name or node.op_type!r} broadcasts at axis {axis} as opset 6 did, but the ranks of its "
            "operands aren't known; export the model with opset 7 or newer"
        )
    dims = list(second.shape)
    missing = len(first.shape) - axis - len(dims)
    if missing <= 0 or all(d == 1 for d in dims):
        return
    if second.is_initializer() and second.const_value is not None:
        array = second.const_value.numpy()
        rewrite_operand(graph, node, 1, array.reshape(array.shape + (1,) * missing))
        return
    axes = [len(dims) + i for i in range(missing)]
    widened = ir.node("Unsqueeze", [second], {"axes": np.array(axes).tolist()})
    widened.name = f"{node.name or node.outputs[0].name}/aligned"
    widened.outputs[0].name = f"{node.outputs[0].name}/aligned"
    widened.outputs[0].type = second.type
    widened.outputs[0].shape = ir.Shape([*dims, *[1] * missing])
    graph.insert_before(node, widened)
    node.replace_input_with(1, widened.outputs[0])
