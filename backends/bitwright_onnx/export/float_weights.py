"""Float weights that ONNX Runtime would round to 8 bits, out of its reach.

A default session rounds the float weight of a convolution or Gemm between quantized tensors itself, with one scale for
the whole tensor (its optimizer `WeightBiasQuantization`; before that it folds what is computed from constants, and
makes Gemm of MatMul and Add). What the plan leaves in float, or in float16, then has 8 bits per tensor without a word.
A maximum of a single tensor, which is that tensor, between the dequantized input and the op isn't touched by it.

The same keeps such an op in float whose weight has scales along another axis than its output channels, as a matrix has
that is read straight and transposed: the integer kernels take scales for those of output channels, and where there are
as many of them as channels nothing stops a default session.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MOVING = frozenset("Identity Reshape Flatten Squeeze Unsqueeze Transpose Slice Gather MaxPool".split())  # noqa: SIM905
"""Ops that ONNX Runtime moves pairs through."""
_DROPPED = frozenset({"Add", "Cast", "Div", "Dropout", "Expand", "Mul", "Pad", "Sub"})
"""Ops that it may make part of a product, or leave out: a sum with zeros, an Expand to the same shape."""
_FUSED = _MOVING | _DROPPED | {"Relu", "Clip", "BatchNormalization"}
"""What may lie between a product and the pair that quantizes it: fused with the one, or moved through by the other."""


def guard_float_weights(model: ir.Model, fresh: Callable[[str], str]) -> None:
    """Put a maximum before each such op.

    Args:
        model: a QDQ model; changed.
        fresh: makes a name one that the model doesn't have.
    """
    guards: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.domain or node.op_type not in _PRODUCTS:
            continue
        source, across = node.inputs[0], _across(node)
        if source is None or not _dequantized(source):
            continue
        if not across and not (_in_float(node.inputs[1]) and _quantized(node.outputs[0])):
            continue
        if source not in guards:
            guard = ir.node("Max", [source], name=fresh(f"{source.name}_guard"))
            out = guard.outputs[0]
            out.name, out.type, out.shape = fresh(f"{source.name}_guarded"), source.type, source.shape
            model.graph.insert_before(node, guard)
            guards[source] = out
        node.replace_input_with(0, guards[source])


def _across(node: ir.Node) -> bool:
    """Whether an op's weight has a scale for each index along another axis than that of the output channels."""
    weight = node.inputs[1]
    pair = None if weight is None else weight.producer()
    if pair is None or pair.op_type != "DequantizeLinear" or pair.attributes.get_int("block_size", 0) != 0:
        return False
    codes, scale = (v if v is None else v.shape for v in pair.inputs[:2])
    if codes is None or scale is None or len(scale) != 1 or node.op_type == "ConvTranspose":  # no integer kernel
        return False
    channels = 0 if node.op_type == "Conv" else len(codes) - 1
    if node.op_type == "Gemm":
        channels = 1 - node.attributes.get_int("transB", 0)
    return pair.attributes.get_int("axis", 1) % len(codes) != channels


def _in_float(value: ir.Value | None) -> bool:
    """Whether a tensor is stored, or computed from what is stored, and not dequantized."""
    if value is None:
        return False
    producer = value.producer()
    if producer is None:
        return value.const_value is not None
    return producer.op_type != "DequantizeLinear" and all(_in_float(v) for v in producer.inputs if v is not None)


def _dequantized(value: ir.Value | None) -> bool:
    """Whether a tensor comes from a DequantizeLinear, or may do when ONNX Runtime has moved and dropped ops."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in _MOVING | _DROPPED:
        moved = producer.inputs[0]  # its other operands say how; they may be computed
        if producer.op_type not in _MOVING:
            varying = [v for v in producer.inputs if v is not None and not _in_float(v)]
            if len(varying) != 1:
                return False
            moved = varying[0]
        producer = None if moved is None else moved.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _quantized(value: ir.Value) -> bool:
    """Whether the only use of a tensor, after what may be fused or moved, is to be quantized."""
    while True:
        users = [user for user, _ in value.uses()]
        if len(users) != 1:
            return False
        if users[0].op_type == "QuantizeLinear":
            return True
        if users[0].op_type not in _FUSED:
            return False
        value = users[0].outputs[0]
