"""Convolutions, linear ops, products of activations, lookups and recurrent ops."""

from __future__ import annotations

import onnx_ir as ir

from bitwright.graph import ConvAttrs, Op, OpKind, ParamRole, ProductAttrs, RecurrentAttrs
from bitwright.graph import operands as operands_of
from bitwright_onnx.emit.layouts import attributes_of, layout_of
from bitwright_onnx.emit.sheet import NotEmittable, Sheet, multiplies_rank_2


def window(attrs: ConvAttrs) -> dict[str, object]:
    """Geometry in ONNX's attributes; ONNX Runtime's integer pools know no dilations, not even of 1."""
    return {
        "kernel_shape": attrs.kernel,
        "strides": attrs.strides,
        "dilations": attrs.dilations if set(attrs.dilations) != {1} else None,
        "pads": (*(begin for begin, _ in attrs.pads), *(end for _, end in attrs.pads)),
    }


def convolution(sheet: Sheet, op: Op) -> ir.Value:
    """Conv and ConvTranspose."""
    attrs = op.attrs
    assert isinstance(attrs, ConvAttrs)
    place = layout_of(sheet, op)
    if place.rank != len(attrs.kernel) + 2:
        raise NotEmittable(op.id, op.type, f"its input has {place.rank} axes, its kernel {len(attrs.kernel)}")
    operands = [place.to_onnx(sheet.values[op.data_inputs[0]]), sheet.param(op, ParamRole.WEIGHT)]
    if ParamRole.BIAS in op.params:
        operands.append(sheet.param(op, ParamRole.BIAS))
    extra = attrs.output_padding or None if op.kind is OpKind.CONV_TRANSPOSE else None
    geometry = window(attrs)
    automatic = str(attributes_of(op).get("auto_pad", ""))
    if automatic.startswith("SAME"):  # over sizes that are free, for which the attributes have no numbers
        geometry |= {"auto_pad": automatic, "pads": None}
    y = sheet.node(op, op.type, *operands, **geometry, group=attrs.groups, output_padding=extra)
    return place.back(y)


def convolution_of_tensors(sheet: Sheet, op: Op) -> ir.Value:
    """A Conv by a filter that is an activation, or a constant that is no parameter.

    The call's `kernel_order`: the filter's axes as ONNX wants them.
    """
    x, kernel = sheet.operands(op)
    if x is None or kernel is None:
        raise NotEmittable(op.id, op.type, "it lacks its filter")
    place, given = layout_of(sheet, op), attributes_of(op)
    weight = sheet.transpose(op, kernel, given.pop("kernel_order"))
    return place.back(sheet.node(op, "Conv", place.to_onnx(x), weight, **given))


def linear(sheet: Sheet, op: Op) -> ir.Value:
    """x · Wᵀ + b: a Gemm of matrices, otherwise MatMul and Add."""
    x = sheet.values[op.data_inputs[0]]
    if multiplies_rank_2(sheet.graph, op):
        operands = [x, sheet.param(op, ParamRole.WEIGHT)]
        if ParamRole.BIAS in op.params:
            operands.append(sheet.param(op, ParamRole.BIAS))
        return sheet.node(op, "Gemm", *operands, transB=1)
    y = sheet.node(op, "MatMul", x, sheet.param(op, ParamRole.WEIGHT, turned=True))
    return sheet.node(op, "Add", y, sheet.param(op, ParamRole.BIAS)) if ParamRole.BIAS in op.params else y


def product(sheet: Sheet, op: Op) -> ir.Value:
    """MatMul of two activations, or of one and a constant that is no weight."""
    operands = sheet.operands(op)
    if len(operands) != 2 or None in operands:
        raise NotEmittable(op.id, op.type, f"a product of {len(operands)} operands")
    turned = (isinstance(op.attrs, ProductAttrs) and op.attrs.transposed) or (False, False)
    for index, (held, flips) in enumerate(zip(operands_of(op), turned, strict=True)):
        value = operands[index]
        if flips and value is not None:
            rank = value.const_value.shape.rank() if value.const_value is not None else sheet.rank(op, str(held))
            operands[index] = sheet.transpose(op, value, (*range(rank - 2), rank - 1, rank - 2))
    return sheet.node(op, "MatMul", *operands)


def embedding(sheet: Sheet, op: Op) -> ir.Value:
    """Rows of a table."""
    table, rows = sheet.operands(op)
    if op.data_inputs and not sheet.graph.tensors[op.data_inputs[0]].dtype.startswith("int"):
        rows = sheet.node(op, "Cast", rows, to=int(ir.DataType.INT64))
    return sheet.node(op, "Gather", table, rows, axis=0)


def recurrent(sheet: Sheet, op: Op) -> list[ir.Value]:
    """LSTM, GRU and RNN, whose parameters lie as ONNX has them; of the outputs, those that the attributes name."""
    assert op.call is not None
    slots = op.attrs.outputs if isinstance(op.attrs, RecurrentAttrs) else tuple(range(len(op.outputs)))
    made = sheet.nodes_of(op, op.type, sheet.operands(op), max(slots) + 1, op.call.attributes)
    return [made[slot] for slot in slots]
