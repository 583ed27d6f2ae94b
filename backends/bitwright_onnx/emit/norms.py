"""Normalizations."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.graph import AxisAttrs, BatchNormAttrs, Op, ParamRole
from bitwright_onnx.emit.layouts import Layout, layout_of
from bitwright_onnx.emit.sheet import NotEmittable, Sheet


def _epsilon(op: Op) -> float:
    assert op.call is not None
    return float(op.call.attributes["epsilon"])  # type: ignore[arg-type]


def batch_norm(sheet: Sheet, op: Op) -> ir.Value:
    """BatchNormalization over any axis; scale and shift that the op hasn't got are ones and zeros."""
    attrs = op.attrs
    assert isinstance(attrs, BatchNormAttrs)
    place = Layout(sheet, op, attrs.axis, sheet.rank(op, op.data_inputs[0]))
    if place.axis == 0:
        raise NotEmittable(op.id, op.type, "it normalizes the samples' axis")
    channels = sheet.graph.params[op.params[ParamRole.MEAN]].shape
    given = [
        sheet.param(op, role) if role in op.params else sheet.literal(op, np.full(channels, fill), sheet.dtype(op))
        for role, fill in ((ParamRole.GAMMA, 1), (ParamRole.BETA, 0))
    ]
    given += [sheet.param(op, role) for role in (ParamRole.MEAN, ParamRole.VAR)]
    x = place.to_onnx(sheet.values[op.data_inputs[0]])
    return place.back(sheet.node(op, "BatchNormalization", x, *given, epsilon=attrs.epsilon))


def layer_norm(sheet: Sheet, op: Op) -> ir.Value:
    """LayerNormalization over an axis and all behind it."""
    axis = op.attrs.axis if isinstance(op.attrs, AxisAttrs) else int(op.call.attributes["axis"])  # type: ignore[union-attr, arg-type]
    x = op.data_inputs[0]
    if ParamRole.GAMMA in op.params:
        scale = sheet.param(op, ParamRole.GAMMA)
    else:
        shape = (sheet.shape(x) or (None,))[axis:]
        if None in shape:
            raise NotEmittable(op.id, op.type, f"the sizes of {x!r} that it normalizes over aren't known")
        scale = sheet.literal(op, np.ones(shape), sheet.dtype(op))
    shift = sheet.param(op, ParamRole.BETA) if ParamRole.BETA in op.params else None
    return sheet.node(op, "LayerNormalization", sheet.values[x], scale, shift, axis=axis, epsilon=_epsilon(op))


def rms_norm(sheet: Sheet, op: Op) -> ir.Value:
    """x / √(mean(x²) + ε) · γ over an axis and all behind it, spelled out: ONNX has it from opset 23 on only."""
    assert op.call is not None
    rank = sheet.rank(op, op.data_inputs[0])
    first = int(op.call.attributes["axis"]) % rank  # type: ignore[arg-type]
    x = sheet.values[op.data_inputs[0]]
    square = sheet.node(op, "Mul", x, x)
    mean = sheet.node(op, "ReduceMean", square, sheet.literal(op, tuple(range(first, rank))), keepdims=1)
    raised = sheet.node(op, "Add", mean, sheet.literal(op, _epsilon(op), sheet.dtype(op)))
    y = sheet.node(op, "Div", x, sheet.node(op, "Sqrt", raised))
    y = sheet.node(op, "Mul", y, sheet.param(op, ParamRole.GAMMA)) if ParamRole.GAMMA in op.params else y
    return sheet.node(op, "Add", y, sheet.param(op, ParamRole.BETA)) if ParamRole.BETA in op.params else y


def group_norm(sheet: Sheet, op: Op) -> ir.Value:
    """Group and instance normalization: an InstanceNormalization of (samples, groups, the rest), then γ and β.

    As in ONNX: GroupNormalization's scale and shift, of opset 20 one for each group, are those of the channels here.
    """
    assert op.call is not None
    place = layout_of(sheet, op)
    shape = sheet.shape(op.data_inputs[0]) or ()
    channels = shape[place.axis]
    if channels is None:
        raise NotEmittable(op.id, op.type, "the number of its channels isn't known")
    groups = channels if op.type == "InstanceNormalization" else int(op.call.attributes["num_groups"])  # type: ignore[arg-type]
    x = place.to_onnx(sheet.values[op.data_inputs[0]])
    flat = sheet.node(op, "Reshape", x, sheet.literal(op, (0, groups, -1)))
    ones, zeros = (sheet.literal(op, np.full(groups, fill), sheet.dtype(op)) for fill in (1, 0))
    y = sheet.node(op, "InstanceNormalization", flat, ones, zeros, epsilon=_epsilon(op))
    y = sheet.node(op, "Reshape", y, sheet.node(op, "Shape", x))
    tail = (channels, *(1,) * (place.rank - 2))
    for role, kind in ((ParamRole.GAMMA, "Mul"), (ParamRole.BETA, "Add")):
        if role in op.params and sheet.graph.params[op.params[role]].shape != (channels,):
            raise NotEmittable(op.id, op.type, f"its {role.value} isn't one number a channel")
        if role in op.params:
            y = sheet.node(op, kind, y, sheet.param(op, role, tail))
    return place.back(y)


def lp_norm(sheet: Sheet, op: Op) -> ir.Value:
    """x / ‖x‖ along one axis."""
    assert op.call is not None
    named = {name: op.call.attributes[name] for name in ("axis", "p")}
    return sheet.node(op, "LpNormalization", sheet.values[op.data_inputs[0]], **named)
