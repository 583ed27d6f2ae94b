"""Words that calls may use beside ONNX's (`Call.type`), each spelled out in a few of its operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from bitwright.graph import Op
from bitwright_onnx.emit.layouts import attributes_of
from bitwright_onnx.emit.sheet import NotEmittable, Sheet, onnx_type


def _given(sheet: Sheet, op: Op, count: int) -> list[ir.Value]:
    found = [v for v in sheet.operands(op) if v is not None]
    if len(found) != count:
        raise NotEmittable(op.id, op.type, f"{len(found)} operands instead of {count}")
    return found


def _number(sheet: Sheet, op: Op, value: float) -> ir.Value:
    return sheet.literal(op, value, sheet.dtype(op))


def square(sheet: Sheet, op: Op) -> ir.Value:
    """x · x."""
    x = sheet.values[op.data_inputs[0]]
    return sheet.node(op, "Mul", x, x)


def squared_difference(sheet: Sheet, op: Op) -> ir.Value:
    """(x − y)²."""
    difference = sheet.node(op, "Sub", *_given(sheet, op, 2))
    return sheet.node(op, "Mul", difference, difference)


def log1p(sheet: Sheet, op: Op) -> ir.Value:
    """log(x + 1)."""
    (x,) = _given(sheet, op, 1)
    return sheet.node(op, "Log", sheet.node(op, "Add", x, _number(sheet, op, 1)))


def expm1(sheet: Sheet, op: Op) -> ir.Value:
    """exp(x) − 1."""
    (x,) = _given(sheet, op, 1)
    return sheet.node(op, "Sub", sheet.node(op, "Exp", x), _number(sheet, op, 1))


def erfc(sheet: Sheet, op: Op) -> ir.Value:
    """1 − erf(x)."""
    (x,) = _given(sheet, op, 1)
    return sheet.node(op, "Sub", _number(sheet, op, 1), sheet.node(op, "Erf", x))


def xlogy(sheet: Sheet, op: Op) -> ir.Value:
    """x · log(y), 0 where x is."""
    x, y = _given(sheet, op, 2)
    zero = _number(sheet, op, 0)
    product = sheet.node(op, "Mul", x, sheet.node(op, "Log", y))
    return sheet.node(op, "Where", sheet.node(op, "Equal", x, zero), zero, product)


def div_no_nan(sheet: Sheet, op: Op) -> ir.Value:
    """x / y, 0 where y is."""
    x, y = _given(sheet, op, 2)
    zero = sheet.node(op, "Equal", y, _number(sheet, op, 0))
    safe = sheet.node(op, "Where", zero, _number(sheet, op, 1), y)
    return sheet.node(op, "Where", zero, _number(sheet, op, 0), sheet.node(op, "Div", x, safe))


def floor_div(sheet: Sheet, op: Op) -> ir.Value:
    """⌊x / y⌋; ONNX's Div rounds whole numbers towards zero."""
    x, y = _given(sheet, op, 2)
    if sheet.graph.tensors[op.output].dtype.startswith(("float", "bfloat")):
        return sheet.node(op, "Floor", sheet.node(op, "Div", x, y))
    return sheet.node(op, "Div", sheet.node(op, "Sub", x, sheet.node(op, "Mod", x, y)), y)


def floor_mod(sheet: Sheet, op: Op) -> ir.Value:
    """x − ⌊x / y⌋ · y, with the divisor's sign, as ONNX's Mod has it for whole numbers alone."""
    x, y = _given(sheet, op, 2)
    if not sheet.graph.tensors[op.output].dtype.startswith(("float", "bfloat")):
        return sheet.node(op, "Mod", x, y)
    return sheet.node(op, "Sub", x, sheet.node(op, "Mul", sheet.node(op, "Floor", sheet.node(op, "Div", x, y)), y))


def not_equal(sheet: Sheet, op: Op) -> ir.Value:
    """Not x = y."""
    return sheet.node(op, "Not", sheet.node(op, "Equal", *_given(sheet, op, 2)))


def truths(sheet: Sheet, op: Op) -> ir.Value:
    """Whether all or any are true; ONNX reduces numbers only."""
    x, axes = _given(sheet, op, 2)
    numbers = sheet.node(op, "Cast", x, to=int(ir.DataType.INT64))
    how = "ReduceMin" if op.type == "ReduceAll" else "ReduceMax"
    y = sheet.node(op, how, numbers, sheet.whole(op, axes), **attributes_of(op))
    return sheet.node(op, "Cast", y, to=int(ir.DataType.BOOL))


def alike(sheet: Sheet, op: Op) -> ir.Value:
    """Zeros or ones in a tensor's shape."""
    (x,) = _given(sheet, op, 1)
    value = sheet.literal(op, int(op.type == "OnesLike"), sheet.graph.tensors[op.output].dtype)
    return sheet.node(op, "Expand", value, sheet.node(op, "Shape", x))


def sizes(sheet: Sheet, op: Op) -> list[ir.Value]:
    """The shape of each tensor."""
    made = [sheet.node(op, "Shape", sheet.values[t], **attributes_of(op)) for t in op.data_inputs]
    return [
        sheet.node(op, "Cast", value, to=int(onnx_type(sheet.graph.tensors[t].dtype)))
        for value, t in zip(made, op.outputs, strict=True)
    ]


def bucketize(sheet: Sheet, op: Op) -> ir.Value:
    """How many of the rising boundaries (operand 1) each number has reached."""
    x, limits = _given(sheet, op, 2)
    last = sheet.literal(op, (-1,))
    reached = sheet.node(op, "GreaterOrEqual", sheet.node(op, "Unsqueeze", x, last), limits)
    counted = sheet.node(op, "Cast", reached, to=int(onnx_type(sheet.graph.tensors[op.output].dtype)))
    return sheet.node(op, "ReduceSum", counted, last, keepdims=0)


def adaptive_pool(sheet: Sheet, op: Op) -> ir.Value:
    """Means or largest values of as many windows an axis as `sizes` say, over the axes `axes`; the windows cut an axis
    at ⌊i · n / size⌋ and end at ⌈(i + 1) · n / size⌉, so that some may overlap and differ in length."""
    given = attributes_of(op)
    y = sheet.values[op.data_inputs[0]]
    shape = sheet.shape(op.data_inputs[0]) or ()
    for axis, size in zip(given["axes"], given["sizes"], strict=True):
        length = shape[axis]
        if length is None:
            raise NotEmittable(op.id, op.type, f"the length of axis {axis} isn't known")
        bounds = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
        y = _windows(sheet, op, y, axis, bounds)
    return y


def _windows(sheet: Sheet, op: Op, x: ir.Value, axis: int, bounds: Sequence[tuple[int, int]]) -> ir.Value:
    how = "ReduceMean" if op.type == "AdaptiveAveragePool" else "ReduceMax"
    place, parts = sheet.literal(op, (axis,)), []
    for first, end in bounds:
        part = sheet.node(op, "Slice", x, sheet.literal(op, (first,)), sheet.literal(op, (end,)), place)
        parts.append(sheet.node(op, how, part, place, keepdims=1))
    return sheet.node(op, "Concat", *parts, axis=axis)


SPELLED: Mapping[str, Callable[[Sheet, Op], ir.Value | list[ir.Value]]] = {
    "Square": square,
    "SquaredDifference": squared_difference,
    "Log1p": log1p,
    "Expm1": expm1,
    "Erfc": erfc,
    "Xlogy": xlogy,
    "DivNoNan": div_no_nan,
    "FloorDiv": floor_div,
    "FloorMod": floor_mod,
    "NotEqual": not_equal,
    **dict.fromkeys(("ReduceAll", "ReduceAny"), truths),
    **dict.fromkeys(("ZerosLike", "OnesLike"), alike),
    "Shape": sizes,
    "Bucketize": bucketize,
    **dict.fromkeys(("AdaptiveAveragePool", "AdaptiveMaxPool"), adaptive_pool),
}
"""By the word."""
