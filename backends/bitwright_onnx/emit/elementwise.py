"""Activations and arithmetic, and what else is an ONNX operator as it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from bitwright.graph import LEAK, ActivationAttrs, AxisAttrs, Op, OpKind, ParamRole
from bitwright_onnx.emit.layouts import attributes_of, layout_of
from bitwright_onnx.emit.sheet import NotEmittable, Sheet, onnx_type

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "HardSigmoid": {"alpha": 1 / 6},
    "MeanVarianceNormalization": {"axes": (0, 2, 3)},
}
"""Attributes whose canonical default (`bitwright.graph.ACTIVATION_TYPES`) isn't ONNX's, or that onnx.checker misses."""

COUNTING = frozenset({"ArgMax", "ArgMin", "NonZero", "Size", "TopK"})
"""Operators whose outputs, or some of them, are places or sizes."""

CHANNELS_FIRST = frozenset({
    "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "MaxPool",
    "GlobalMaxPool", "LRN", "LpPool", "GlobalLpPool", "GridSample", "MaxRoiPool", "RoiAlign", "MaxUnpool", "Col2Im",
    "DeformConv", "MeanVarianceNormalization",
})  # fmt: skip
"""Operators that take channels on axis 1."""


def plain(sheet: Sheet, op: Op) -> list[ir.Value]:
    """An ONNX operator with the op's own operands and attributes.

    Raises:
        NotEmittable: ONNX has it with channels on axis 1 alone, and here they lie elsewhere.
    """
    if op.type in CHANNELS_FIRST and not layout_of(sheet, op).native:
        raise NotEmittable(op.id, op.type, "its channels don't lie on axis 1")
    attributes = dict(DEFAULTS.get(op.type, {})) | attributes_of(op)
    if isinstance(op.attrs, AxisAttrs):
        attributes["axis"] = op.attrs.axis
    count = max(len(op.outputs), 2 if op.type == "TopK" else 1)
    made = sheet.nodes_of(op, op.type, sheet.operands(op), count, attributes)[: len(op.outputs)]
    if op.type in COUNTING:  # in 64 bits, whatever the graph says
        kinds = [sheet.graph.tensors[t].dtype for t in op.outputs]
        made = [
            sheet.node(op, "Cast", v, to=int(onnx_type(kind))) if kind.startswith("int") and kind != "int64" else v
            for v, kind in zip(made, kinds, strict=True)
        ]
    return made


def cast(sheet: Sheet, op: Op) -> ir.Value:
    """A cast to the type of the output."""
    to = int(onnx_type(sheet.graph.tensors[op.output].dtype))
    return sheet.node(op, "Cast", sheet.values[op.data_inputs[0]], to=to, saturate=attributes_of(op).get("saturate"))


def clip(sheet: Sheet, op: Op) -> ir.Value:
    """Bounds of the attributes, or computed ones."""
    x, attrs = sheet.values[op.data_inputs[0]], op.attrs
    if (op.call is not None and op.call.operands) or len(op.inputs) > 1:
        return sheet.node(op, "Clip", *sheet.operands(op))
    assert isinstance(attrs, ActivationAttrs)
    if attrs.minimum is None and attrs.maximum is None:
        raise NotEmittable(op.id, op.type, "its bounds aren't known")
    bounds = (None if b is None else sheet.literal(op, b, sheet.dtype(op)) for b in (attrs.minimum, attrs.maximum))
    return sheet.node(op, "Clip", x, *bounds)


def leaky_relu(sheet: Sheet, op: Op) -> ir.Value:
    """With the attributes' slope."""
    alpha = op.attrs.alpha if isinstance(op.attrs, ActivationAttrs) else None
    return sheet.node(op, "LeakyRelu", sheet.values[op.data_inputs[0]], alpha=LEAK if alpha is None else alpha)


def prelu(sheet: Sheet, op: Op) -> ir.Value:
    """Slopes by channel stand on the channels' axis; those of several axes are broadcast as they are."""
    x = op.data_inputs[0]
    slope = sheet.graph.params[op.params[ParamRole.SLOPE]].shape
    form = None
    if len(slope) == 1 and slope[0] != 1:
        place = layout_of(sheet, op)
        form = (slope[0], *(1,) * (place.rank - place.axis - 1))
    return sheet.node(op, "PRelu", sheet.values[x], sheet.param(op, ParamRole.SLOPE, form))


def swish(sheet: Sheet, op: Op) -> ir.Value:
    """x · sigmoid(x), spelled out: ONNX has it from opset 24 on only."""
    x = sheet.values[op.data_inputs[0]]
    alpha = op.call.attributes.get("alpha", 1.0) if op.call is not None else 1.0
    inner = x if alpha == 1.0 else sheet.node(op, "Mul", x, sheet.literal(op, alpha, sheet.dtype(op)))
    return sheet.node(op, "Mul", x, sheet.node(op, "Sigmoid", inner))


def one_hot(sheet: Sheet, op: Op) -> ir.Value:
    """OneHot, of which ONNX Runtime has few combinations of types: 64 bits wherever there are whole numbers."""
    indices, depth, values = sheet.operands(op)
    if indices is None or depth is None or values is None:
        raise NotEmittable(op.id, op.type, "it lacks an operand")
    kind = onnx_type(sheet.graph.tensors[op.output].dtype)
    real = kind.is_floating_point()
    held = values if real else sheet.node(op, "Cast", values, to=int(ir.DataType.INT64))
    y = sheet.node(op, "OneHot", sheet.whole(op, indices), sheet.whole(op, depth), held, **attributes_of(op))
    return y if real else sheet.node(op, "Cast", y, to=int(kind))


def identity(sheet: Sheet, op: Op) -> ir.Value:
    """What passes its input on is no node: the output is the input's value."""
    return sheet.values[op.data_inputs[0]]


def split_sizes(sheet: Sheet, op: Op) -> list[ir.Value]:
    """Split: by the given sizes, or those of the outputs."""
    assert op.kind is OpKind.SPLIT or op.call is not None
    axis = op.attrs.axis if isinstance(op.attrs, AxisAttrs) else int(op.call.attributes["axis"])  # type: ignore[union-attr, arg-type]
    x, *given = sheet.operands(op)
    sizes = [shape[axis] if (shape := sheet.shape(t)) is not None and len(shape) > axis else None for t in op.outputs]
    squeezed = op.call is not None and bool(op.call.attributes.get("squeeze"))
    if squeezed:
        sizes = [1] * len(op.outputs)
    elif given and given[0] is not None:
        return sheet.nodes_of(op, "Split", (x, given[0]), len(op.outputs), {"axis": axis})
    if None in sizes:
        return sheet.nodes_of(op, "Split", (x,), len(op.outputs), {"axis": axis, "num_outputs": len(op.outputs)})
    parts = sheet.nodes_of(op, "Split", (x, sheet.literal(op, tuple(sizes))), len(op.outputs), {"axis": axis})
    if not squeezed:
        return parts
    return [sheet.node(op, "Squeeze", part, sheet.literal(op, (axis,))) for part in parts]


def concat(sheet: Sheet, op: Op) -> ir.Value:
    """Concat; with `new_axis`, a stack."""
    axis = op.attrs.axis if isinstance(op.attrs, AxisAttrs) else int(op.call.attributes["axis"])  # type: ignore[union-attr, arg-type]
    parts = sheet.operands(op)
    if op.call is not None and op.call.attributes.get("new_axis"):
        parts = [sheet.node(op, "Unsqueeze", part, sheet.literal(op, (axis,))) for part in parts]
    return sheet.node(op, "Concat", *parts, axis=axis)
