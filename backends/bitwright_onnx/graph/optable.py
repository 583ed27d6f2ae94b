"""Which operand of an ONNX operator is which parameter (of which kind it is: `bitwright.graph.KINDS`)."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from bitwright.graph import ParamRole
from bitwright.placement import is_mask
from bitwright_onnx.graph.tensors import tensor_array

R = ParamRole

OPERANDS: Mapping[str, Mapping[int, ParamRole]] = {
    "Conv": {1: R.WEIGHT, 2: R.BIAS},
    "ConvTranspose": {1: R.WEIGHT, 2: R.BIAS},
    "Gemm": {1: R.WEIGHT, 2: R.BIAS},
    "BatchNormalization": {1: R.GAMMA, 2: R.BETA, 3: R.MEAN, 4: R.VAR},
    "LayerNormalization": {1: R.GAMMA, 2: R.BETA},
    "InstanceNormalization": {1: R.GAMMA, 2: R.BETA},
    "GroupNormalization": {1: R.GAMMA, 2: R.BETA},
    "RMSNormalization": {1: R.GAMMA},
    "PRelu": {1: R.SLOPE},
    "LSTM": {1: R.WEIGHT, 2: R.RECURRENT, 3: R.BIAS},
    "GRU": {1: R.WEIGHT, 2: R.RECURRENT, 3: R.BIAS},
    "RNN": {1: R.WEIGHT, 2: R.RECURRENT, 3: R.BIAS},
}
"""Roles of constant operands by position; elementwise ops take theirs from either side (see `constant_operands`)."""

QUANTIZED_OPS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv",
                           "QLinearMatMul", "ConvInteger", "MatMulInteger", "QAttention", "QGemm", "QLinearAdd",
                           "MatMulNBits"})  # fmt: skip
"""Operators that only models which are quantized already contain."""

FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


def is_float_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer of a float type."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and value.const_value.dtype in FLOAT_TYPES
    )


def is_default_domain(node: ir.Node) -> bool:
    """Whether an op is one of ONNX's own (custom domains may reuse its names)."""
    return node.domain in ("", "ai.onnx")


def constant_shape(value: ir.Value) -> tuple[int, ...]:
    """Shape of an initializer, from its data."""
    assert value.const_value is not None
    return tuple(d for d in value.const_value.shape if isinstance(d, int))


def flag(node: ir.Node, name: str) -> bool:
    """An attribute that is 0 or 1, by default 0."""
    return bool(node.attributes.get_int(name, False))


def linear_weight(node: ir.Node) -> ir.Value | None:
    """The constant weight of a Conv, ConvTranspose, Gemm, or a MatMul with a constant matrix on the right.

    The right one may be the transpose of a matrix that other ops read as it is (see `turned`).
    """
    if not is_default_domain(node) or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    weight = node.inputs[1]
    if node.op_type == "MatMul" and (turn := turned(node)) is not None:
        weight = turn.inputs[0]
    if weight is None or not is_float_constant(weight) or is_float_constant(node.inputs[0]):
        return None
    if node.op_type in ("Gemm", "MatMul") and len(constant_shape(weight)) != 2:
        return None
    if node.op_type == "Gemm" and (flag(node, "transA") or node.attributes.get_float("alpha", 1.0) != 1.0):
        return None
    return weight


def is_mask_constant(value: ir.Value) -> bool:
    """Whether a float initializer is a mask (−∞ for classes that don't count), and so no bias."""
    return value.const_value is not None and is_mask(tensor_array(value.const_value))


def plain_bias(node: ir.Node) -> bool:
    """Whether a product has no bias, or a constant one for each output channel."""
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is None:
        return True
    vector = is_float_constant(bias) and len(constant_shape(bias)) == 1
    return vector and node.attributes.get_float("beta", 1.0) == 1.0


def turned(node: ir.Node) -> ir.Node | None:
    """The Transpose of a constant matrix on the right of a MatMul, if that is what it reads there.

    Language models multiply by the transpose of their embedding's table: one array, two uses, one parameter.
    """
    right = node.inputs[1] if len(node.inputs) > 1 else None
    turn = right.producer() if right is not None else None
    return turn if turn is not None and turn.graph is node.graph and turns_weight(turn) else None


def turns_weight(node: ir.Node) -> bool:
    """Whether a node transposes a constant float matrix, for MatMuls alone that have it on their right."""
    if node.op_type != "Transpose" or not is_default_domain(node) or node.outputs[0].is_graph_output():
        return False
    matrix = node.inputs[0]
    if matrix is None or not is_float_constant(matrix) or len(constant_shape(matrix)) != 2:
        return False
    perm = node.attributes.get("perm")
    uses = list(node.outputs[0].uses())
    return (
        (perm is None or list(perm.as_ints()) == [1, 0])
        and bool(uses)
        and all(
            use.node.op_type == "MatMul"
            and is_default_domain(use.node)
            and use.idx == 1
            and use.node.graph is node.graph
            for use in uses
        )
    )


def shares_weight(matrix: ir.Value) -> bool:
    """Whether several ops read a matrix, all of them with its rows as outputs: lookups, transposes for MatMuls, Gemms.

    What reads it the other way round needs an array of its own.
    """
    uses = list(matrix.uses())
    return len(uses) > 1 and all(
        turns_weight(node)
        or (node.op_type == "Gather" and index == 0 and not node.attributes.get_int("axis", 0))
        or (node.op_type == "Gemm" and index == 1 and flag(node, "transB"))
        for node, index in uses
    )


def out_channels(node: ir.Node, weight: ir.Value) -> int:
    """Output channels of a Conv or ConvTranspose, output width of a Gemm or MatMul."""
    shape = constant_shape(weight)
    match node.op_type:
        case "Conv":
            return shape[0]
        case "ConvTranspose":
            return shape[1] * (node.attributes.get_int("group") or 1)
        case "Gemm":
            return shape[0 if flag(node, "transB") else 1]
    return shape[1 if turned(node) is None else 0]


def bias_add(node: ir.Node) -> ir.Node | None:
    """The Add that gives a MatMul its bias: the only reader of its output, with a constant (out,) operand."""
    weight = linear_weight(node) if node.op_type == "MatMul" else None
    output = node.outputs[0]
    if weight is None or output.is_graph_output() or len(readers := list(output.uses())) != 1:
        return None
    add, index = readers[0]
    if not is_default_domain(add) or add.op_type != "Add" or add.graph is not node.graph:
        return None
    bias = add.inputs[1 - index]
    if bias is None or not is_float_constant(bias) or is_mask_constant(bias):
        return None
    shape = constant_shape(bias)
    rank = len(output.shape) if output.shape is not None else None
    leading = all(d == 1 for d in shape[:-1]) and (len(shape) == 1 or (rank is not None and len(shape) <= rank))
    return add if shape and shape[-1] == out_channels(node, weight) and leading else None
