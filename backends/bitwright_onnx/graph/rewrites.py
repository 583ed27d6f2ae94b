"""Rewrites of single ops into the spelling that the rest of the backend expects."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright_onnx.graph.initializers import rewrite_operand, unique_name
from bitwright_onnx.graph.optable import (
    constant_shape,
    flag,
    is_default_domain,
    is_float_constant,
    is_mask_constant,
    linear_weight,
    out_channels,
    shares_weight,
    turns_weight,
)
from bitwright_onnx.graph.tensors import tensor_array


def rewrite(graph: ir.Graph) -> None:
    """Apply all rewrites to the main graph."""
    share_transposes(graph)
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


def share_transposes(graph: ir.Graph) -> None:
    """One array for a matrix that is transposed by several nodes, each of which has one reader of its own.

    Where nothing reads it as it is, the array is turned once, and keeps its name.
    """
    matrices = {m: None for node in graph if turns_weight(node) and (m := node.inputs[0]) is not None}
    for matrix in matrices:
        users = [use.node for use in matrix.uses()]
        if not shares_weight(matrix):
            continue
        if matrix.is_graph_output() or not all(turns_weight(user) for user in users):
            for turn in dict.fromkeys(u for u in users if turns_weight(u)):
                for use in list(turn.outputs[0].uses())[1:]:
                    own = ir.node("Transpose", [matrix], {"perm": [1, 0]}, name=f"{use.node.name}/weight")
                    own.outputs[0].type, own.outputs[0].shape = turn.outputs[0].type, turn.outputs[0].shape
                    own.outputs[0].name = unique_name(graph, f"{use.node.name}/weight")
                    graph.insert_before(use.node, own)
                    use.node.replace_input_with(use.idx, own.outputs[0])
            continue
        assert matrix.const_value is not None
        array = np.ascontiguousarray(tensor_array(matrix.const_value).T)
        matrix.const_value = ir.Tensor(array, dtype=matrix.const_value.dtype, name=matrix.name)
        matrix.shape = ir.Shape(array.shape)
        for turn in users:
            turn.outputs[0].replace_all_uses_with(matrix)
            graph.remove(turn, safe=True)


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


def turn_gemms(graph: ir.Graph) -> None:
    """Let each Gemm of a constant's transpose read the constant itself the other way round: one array, all its uses."""
    for node in list(graph):
        right = node.inputs[1] if node.op_type == "Gemm" and is_default_domain(node) else None
        turn = right.producer() if right is not None else None
        if turn is None or turn.graph is not graph or turn.op_type != "Transpose" or not is_default_domain(turn):
            continue
        matrix = turn.inputs[0]
        if matrix is None or not is_float_constant(matrix) or len(constant_shape(matrix)) != 2:
            continue
        perm = turn.attributes.get("perm")
        if perm is not None and list(perm.as_ints()) != [1, 0]:
            continue
        node.replace_input_with(1, matrix)
        node.attributes["transB"] = ir.AttrInt64("transB", 1 - int(flag(node, "transB")))
        if not turn.outputs[0].uses() and not turn.outputs[0].is_graph_output():
            graph.remove(turn, safe=True)


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
