"""Arithmetic of GraphDef: elementwise ops, comparisons, biases, matrix products, reductions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright_onnx.graphdef.builder import Builder, Linear
from bitwright_onnx.graphdef.conv import channels_last
from bitwright_onnx.graphdef.nodes import Node

Handler = Callable[[Builder, Node], None]

DIRECT: Mapping[str, str] = {
    **{n: n for n in ("Relu", "Elu", "Selu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Erf", "Exp", "Log", "Sqrt",
                      "Abs", "Neg", "Sign", "Floor", "Ceil", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh",
                      "Cosh", "Asinh", "Acosh", "Atanh", "Reciprocal", "Round", "IsInf", "Add", "Sub", "Mul",
                      "Pow", "Equal", "Less", "Greater")},
    "AddV2": "Add", "AddN": "Sum", "RealDiv": "Div", "Div": "Div", "Maximum": "Max",
    "Minimum": "Min", "Inv": "Reciprocal", "Rint": "Round", "LessEqual": "LessOrEqual",
    "GreaterEqual": "GreaterOrEqual", "LogicalAnd": "And", "LogicalOr": "Or", "LogicalNot": "Not",
    "IsNan": "IsNaN",
}  # fmt: skip
"""Ops that ONNX has with the same operands, by another name or the same."""

REDUCTIONS: Mapping[str, str] = {
    "Mean": "ReduceMean", "Sum": "ReduceSum", "Max": "ReduceMax", "Min": "ReduceMin", "Prod": "ReduceProd",
}  # fmt: skip


def direct(g: Builder, node: Node) -> None:
    """One ONNX op with the same operands."""
    if node.op in ("Add", "AddV2") and absorb_bias(g, node):
        return
    inputs = [g.value(i) for i in node.inputs]
    g.set(node.output(), g.add(DIRECT[node.op], *inputs, hint=node.name))


def bias_add(g: Builder, node: Node) -> None:
    """BiasAdd: becomes the bias of the convolution before it where nobody else reads that."""
    if absorb_bias(g, node):
        return
    bias = g.value(node.inputs[1])
    if not channels_last(node):
        array, rank = g.known(node.inputs[1]), len(g.shape(node.inputs[0]) or (0,) * 4)
        if array is not None:
            bias = g.form(node.inputs[1], array.reshape(-1, *(1,) * (rank - 2)), "bias")
        else:
            axes = g.numbers(f"{node.name}/axes", range(1, rank - 1))
            bias = g.add("Unsqueeze", bias, axes, hint=node.name)
    g.set(node.output(), g.add("Add", g.value(node.inputs[0]), bias, hint=node.name))


def absorb_bias(g: Builder, node: Node) -> bool:
    """Give a constant for each channel to the convolution or matrix product before; False where it can't be."""
    if len(node.inputs) != 2:
        return False
    for data, bias in (node.inputs, node.inputs[::-1]):
        linear, array = g.linear.get(data), g.known(bias)
        if linear is None or array is None or not g.is_private(data) or data in g.constants:
            continue
        shape = array.shape
        while len(shape) > len(linear.trailing) and shape[0] == 1:
            shape = shape[1:]
        if shape != linear.trailing or g.values[data] is not linear.result:
            continue
        convolves = linear.node.op_type in ("Conv", "ConvTranspose")
        if not convolves and linear.trailing == (linear.channels,):
            return False  # MatMul and Add lie side by side already
        value = g.form(bias, array.reshape(-1), "bias")
        if convolves:
            linear.node.resize_inputs(3)
            linear.node.replace_input_with(2, value)
        else:
            _add_after(g, linear, value, node.name)
        g.rename(node.output(), linear.result)
        return True
    return False


def _add_after(g: Builder, linear: Linear, bias: ir.Value, name: str) -> None:
    """An Add between a matrix product and the Reshape that splits its channels."""
    product = linear.node.outputs[0]
    uses = list(product.uses())
    total = g.add("Add", product, bias, hint=name)
    made = g.made.pop()
    g.made.insert(g.made.index(linear.node) + 1, made)
    for user, index in uses:
        user.replace_input_with(index, total)


def composed(g: Builder, node: Node) -> None:
    """Elementwise functions that take two or three ONNX ops."""
    x = g.value(node.inputs[0])
    rest = [g.value(i) for i in node.inputs[1:]]

    def op(name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return g.add(name, *inputs, hint=node.name, **attributes)

    def number(value: float) -> ir.Value:
        return g.scalar_like(node, value)

    match node.op:
        case "Relu6":
            y = op("Clip", x, number(0), number(6))
        case "LeakyRelu":
            y = op("LeakyRelu", x, alpha=node.number("alpha", 0.2))
        case "ClipByValue":
            y = op("Min", op("Max", x, rest[0]), rest[1])
        case "Square":
            y = op("Mul", x, x)
        case "SquaredDifference":
            d = op("Sub", x, rest[0])
            y = op("Mul", d, d)
        case "Rsqrt":
            y = op("Reciprocal", op("Sqrt", x))
        case "Erfc":
            y = op("Sub", number(1), op("Erf", x))
        case "Log1p":
            y = op("Log", op("Add", x, number(1)))
        case "Expm1":
            y = op("Sub", op("Exp", x), number(1))
        case "Xlogy":
            y = op("Mul", x, op("Log", rest[0]))
        case "DivNoNan":
            zero = op("Equal", rest[0], number(0))
            safe = op("Where", zero, number(1), rest[0])
            y = op("Where", zero, number(0), op("Div", x, safe))
        case "NotEqual":
            y = op("Not", op("Equal", x, rest[0]))
        case "FloorDiv":
            y = op("Floor", op("Div", x, rest[0])) if node.dtype("T") in (1, 2, 19) else _floor_div(g, node, x, rest[0])
        case "FloorMod":
            # ONNX's Mod has the divisor's sign for integers, as TensorFlow; for floats only fmod, of the other sign.
            if node.dtype("T") in (1, 2, 19):
                y = op("Sub", x, op("Mul", op("Floor", op("Div", x, rest[0])), rest[0]))
            else:
                y = op("Mod", x, rest[0])
        case _:
            raise AssertionError(node.op)
    g.set(node.output(), y)


def _floor_div(g: Builder, node: Node, x: ir.Value, divisor: ir.Value) -> ir.Value:
    """Integers rounded down; ONNX's Div rounds towards zero."""
    rest = g.add("Mod", x, divisor, hint=node.name)
    return g.add("Div", g.add("Sub", x, rest, hint=node.name), divisor, hint=node.name)


def softmax(g: Builder, node: Node) -> None:
    """Softmax and LogSoftmax, over the last axis."""
    g.set(node.output(), g.add(node.op, g.value(node.inputs[0]), hint=node.name, axis=-1))


def matmul(g: Builder, node: Node) -> None:
    """MatMul, BatchMatMul, V2 and V3: transposes of constants are carried out, the others computed."""
    batched = node.op != "MatMul"
    flips = ("adj_x", "adj_y") if batched else ("transpose_a", "transpose_b")
    operands = []
    for index, flag in enumerate(flips):
        tensor = node.inputs[index]
        array, turned = g.known(tensor), node.flag(flag)
        if array is not None:
            operands.append(g.form(tensor, array.swapaxes(-1, -2) if turned else array, f"matrix{turned}"))
        elif turned:
            shape = g.shape(tensor)
            rank = 2 if not batched else len(shape) if shape is not None else None
            if rank is None:
                raise ModelError(f"{node.op} {node.name!r}: the rank of {tensor!r} isn't known")
            order = (*range(rank - 2), rank - 1, rank - 2)
            operands.append(g.transpose(g.value(tensor), order, node.name))
        else:
            operands.append(g.value(tensor))
    y = g.add("MatMul", *operands, hint=node.name)
    g.set(node.output(), y)
    matrix = g.known(node.inputs[1])
    if matrix is not None and matrix.ndim == 2:
        channels = operands[1].shape[-1]  # type: ignore[index]
        producer = y.producer()
        assert producer is not None and isinstance(channels, int)
        g.linear[node.output()] = Linear(producer, y, channels, (channels,))


def einsum(g: Builder, node: Node) -> None:
    """Einsum; with a constant that contracts the last axes and adds new ones last, a matrix product."""
    equation = node.text("equation").replace(" ", "")
    if len(node.inputs) == 2 and _as_matmul(g, node, equation):
        return
    y = g.add("Einsum", *map(g.value, node.inputs), hint=node.name, equation=equation)
    g.set(node.output(), y)


def _as_matmul(g: Builder, node: Node, equation: str) -> bool:
    """x[batch, contracted] · w[contracted, new] → [batch, new], as a MatMul on a matrix that can have scales."""
    terms, _, out = equation.partition("->")
    x, w = terms.split(",")
    array, tensor = g.known(node.inputs[1]), node.inputs[1]
    inner = [c for c in w if c in x and c not in out]
    new = [c for c in w if c not in x]
    count = len(inner)
    shape = g.shape(node.inputs[0])
    if array is None or not inner or not new or shape is None or "." in equation:
        return False
    if x[-count:] != "".join(inner) or w != "".join(inner + new) or out != x[:-count] + "".join(new):
        return False
    matrix = array.reshape(int(np.prod(array.shape[:count])), -1)
    value = g.value(node.inputs[0])
    batch = shape[: len(shape) - count]
    if count > 1:
        value = _reshape_last(g, node, value, batch, [matrix.shape[0]])
    y = g.add("MatMul", value, g.form(tensor, matrix, "matrix"), hint=node.name)
    producer = y.producer()
    assert producer is not None
    trailing = array.shape[count:]
    if len(trailing) > 1:
        y = _reshape_last(g, node, y, batch, trailing)
    g.set(node.output(), y)
    g.linear[node.output()] = Linear(producer, y, matrix.shape[1], trailing)
    return True


def _reshape_last(g: Builder, node: Node, value: ir.Value, batch: tuple[int | None, ...], last: object) -> ir.Value:
    """Reshape all axes behind the batch axes."""
    fixed = [*(0 if b is None else b for b in batch), *last]  # type: ignore[misc]
    return g.add("Reshape", value, g.numbers(f"{node.name}/shape", fixed), hint=node.name)


def reduction(g: Builder, node: Node) -> None:
    """Mean, Sum, Max, Min and Prod; the mean over height and width is a global average pool."""
    axes = [int(a) for a in np.reshape(g.constant(node, 1, "the axes"), -1)]
    keep = node.flag("keep_dims")
    shape = g.shape(node.inputs[0])
    x = g.value(node.inputs[0])
    if node.op in ("Mean", "Max") and shape is not None and len(shape) == 4 and {a % 4 for a in axes} == {1, 2}:
        kind = "GlobalAveragePool" if node.op == "Mean" else "GlobalMaxPool"
        y = g.add(kind, g.transpose(x, (0, 3, 1, 2), node.name), hint=node.name)
        if keep:
            y = g.add("Transpose", y, hint=node.name, perm=[0, 2, 3, 1])
        else:
            y = g.add("Squeeze", y, g.numbers(f"{node.name}/axes", [2, 3]), hint=node.name)
    elif not axes:
        y = x
    else:
        given = g.numbers(f"{node.name}/axes", axes)
        y = g.add(REDUCTIONS[node.op], x, given, hint=node.name, keepdims=int(keep))
    g.set(node.output(), y)


def logical_reduction(g: Builder, node: Node) -> None:
    """All and Any, which ONNX has of numbers only."""
    axes = g.numbers(f"{node.name}/axes", np.reshape(g.constant(node, 1, "the axes"), -1))
    numbers = g.add("Cast", g.value(node.inputs[0]), hint=node.name, to=int(ir.DataType.INT64))
    kind = "ReduceMin" if node.op == "All" else "ReduceMax"
    y = g.add(kind, numbers, axes, hint=node.name, keepdims=int(node.flag("keep_dims")))
    g.set(node.output(), g.add("Cast", y, hint=node.name, to=int(ir.DataType.BOOL)))


def arg_reduction(g: Builder, node: Node) -> None:
    """ArgMax and ArgMin; the first of equals."""
    axis = int(g.constant(node, 1, "the axis"))
    y = g.add(node.op, g.value(node.inputs[0]), hint=node.name, axis=axis, keepdims=0)
    g.set(node.output(), y)


def cumulative(g: Builder, node: Node) -> None:
    """Cumsum."""
    y = g.add(
        "CumSum", g.value(node.inputs[0]), g.value(node.inputs[1]), hint=node.name,
        exclusive=int(node.flag("exclusive")), reverse=int(node.flag("reverse")),
    )  # fmt: skip
    g.set(node.output(), y)


def select(g: Builder, node: Node) -> None:
    """Select: a vector condition chooses whole rows; SelectV2 broadcasts as ONNX does."""
    condition, x, y = map(g.value, node.inputs)
    shapes = [g.shape(i) for i in node.inputs[:2]]
    if node.op == "Select" and shapes[0] is not None and shapes[1] is not None and len(shapes[0]) == 1:
        extra = range(1, len(shapes[1]))
        if extra:
            axes = g.numbers(f"{node.name}/axes", extra)
            condition = g.add("Unsqueeze", condition, axes, hint=node.name)
    g.set(node.output(), g.add("Where", condition, x, y, hint=node.name))


HANDLERS: Mapping[str, Handler] = {
    **dict.fromkeys(DIRECT, direct),
    "BiasAdd": bias_add,
    "BiasAddV1": bias_add,
    **dict.fromkeys(
        ("Relu6", "LeakyRelu", "ClipByValue", "Square", "SquaredDifference", "Rsqrt", "Erfc", "Log1p", "Expm1",
         "Xlogy", "DivNoNan", "NotEqual", "FloorDiv", "FloorMod"),
        composed,
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax"), softmax),
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), matmul),
    "Einsum": einsum,
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(("All", "Any"), logical_reduction),
    **dict.fromkeys(("ArgMax", "ArgMin"), arg_reduction),
    "Cumsum": cumulative,
    **dict.fromkeys(("Select", "SelectV2"), select),
}  # fmt: skip
