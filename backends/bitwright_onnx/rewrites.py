"""Rewrites of single ops into the spelling that the rest of the backend expects."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright_onnx.initializers import rewrite_operand
from bitwright_onnx.optable import (
    constant_shape,
    is_default_domain,
    is_float_constant,
    is_mask_constant,
    linear_weight,
    out_channels,
)
from bitwright_onnx.session import tensor_array


def rewrite(graph: ir.Graph) -> None:
    """Apply all rewrites to the main graph."""
    for node in list(graph):
        if not is_default_domain(node) or node.graph is None:
            continue
        if node.op_type == "Identity":
            bypass_identity(graph, node)
        elif node.op_type == "Gemm":
            normalize_gemm(graph, node)
    for node in list(graph):
        if is_default_domain(node) and node.op_type in ("Conv", "ConvTranspose"):
            absorb_bias(graph, node)


def bypass_identity(graph: ir.Graph, node: ir.Node) -> None:
    """Let the readers of an Identity read its input; one that gives a model output its name stays."""
    source = node.inputs[0]
    if source is not None and not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(source)
        graph.remove(node, safe=True)


def absorb_bias(graph: ir.Graph, node: ir.Node) -> None:
    """Conv without bias, then an Add of a constant per channel (its only reader) → Conv with bias.

    The convolution takes over the Add's output, with its name.
    """
    weight, output = linear_weight(node), node.outputs[0]
    if weight is None or (len(node.inputs) > 2 and node.inputs[2] is not None):
        return
    if output.is_graph_output() or len(readers := list(output.uses())) != 1:
        return
    add, index = readers[0]
    bias = add.inputs[1 - index] if add.op_type == "Add" and is_default_domain(add) else None
    if add.graph is not graph or not is_float_constant(bias):
        return
    assert bias is not None and bias.const_value is not None
    if is_mask_constant(bias):
        return
    shape, rank, channels = constant_shape(bias), len(constant_shape(weight)), out_channels(node, weight)
    if shape not in ((1, channels, *(1,) * (rank - 2)), (channels, *(1,) * (rank - 2))):
        return
    node.resize_inputs(3)
    add.replace_input_with(1 - index, None)
    node.replace_input_with(2, bias)
    rewrite_operand(graph, node, 2, tensor_array(bias.const_value).reshape(-1))
    take_over(graph, node, add)


def take_over(graph: ir.Graph, node: ir.Node, last: ir.Node) -> None:
    """Remove `last`, whose first output `node` now produces: its name, type, readers and place among the outputs."""
    mine, theirs = node.outputs[0], last.outputs[0]
    name, shape, dtype = theirs.name, theirs.shape, theirs.type
    theirs.replace_all_uses_with(mine, replace_graph_outputs=True)
    graph.remove(last, safe=True)
    mine.name = name
    mine.shape, mine.type = shape if shape is not None else mine.shape, dtype if dtype is not None else mine.type


def normalize_gemm(graph: ir.Graph, node: ir.Node) -> None:
    """alpha into the weight, beta into the bias, and the bias to shape (out,), where these are constants."""
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or weight.const_value is None or not weight.is_initializer():
        return
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    if alpha != 1.0:
        array = tensor_array(weight.const_value)
        rewrite_operand(graph, node, 1, (array * np.asarray(alpha, array.dtype)).astype(array.dtype))
        node.attributes.pop("alpha")
    if bias is None:
        node.attributes.pop("beta", None)
        return
    if bias.const_value is None or not bias.is_initializer():
        return
    out = out_channels(node, weight)
    array = tensor_array(bias.const_value)
    if array.size in (1, out) and (array.ndim < 2 or array.shape[0] == 1):
        scaled = (array.reshape(-1) * np.asarray(beta, array.dtype)).astype(array.dtype)
        if beta != 1.0 or array.shape != (out,):
            rewrite_operand(graph, node, 2, np.ascontiguousarray(np.broadcast_to(scaled, (out,))))
        node.attributes.pop("beta", None)
