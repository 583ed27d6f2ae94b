"""Adding and changing initializers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.graph import free_name


def unique_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or it with a number, such that no tensor of the graph or of its subgraphs has it."""
    return free_name(wanted, ir.convenience.create_value_mapping(graph))


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """A new initializer under a free name."""
    name = unique_name(graph, name)
    tensor = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name)  # keeps rank 0
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def rewrite_operand(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> ir.Value:
    """Change a constant operand: in place where the node alone reads it, else as a copy of its own."""
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    dtype = value.const_value.dtype
    if is_private(value):
        value.const_value = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=value.name)
        value.shape = ir.Shape(array.shape)
        return value
    own = add_initializer(graph, f"{value.name}.{node.name}", array, dtype)
    node.replace_input_with(index, own)
    return own


def is_private(value: ir.Value) -> bool:
    """Whether one operand of one node is all that reads an initializer."""
    return len(list(value.uses())) == 1 and not value.is_graph_output()
