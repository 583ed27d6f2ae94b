"""Pools, reductions, resizing, and changes of form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.graph import Constant, Op, PoolAttrs, operands
from bitwright_onnx.emit.elementwise import plain
from bitwright_onnx.emit.layouts import Layout, attributes_of, layout_of
from bitwright_onnx.emit.products import window
from bitwright_onnx.emit.sheet import NotEmittable, Sheet, onnx_type


def pool(sheet: Sheet, op: Op) -> ir.Value:
    """Windowed pooling; global pooling over the axes that the attributes name."""
    attrs, largest = op.attrs, op.type in ("MaxPool", "GlobalMaxPool")
    if op.type == "GlobalMaxPool" and len(operands(op)) > 1:
        return reduction(sheet, replace(op, type="ReduceMax"))
    if op.type == "GlobalMaxPool" and not isinstance(attrs, PoolAttrs):
        return plain(sheet, op)[0]
    if "kernel_shape" not in attributes_of(op):
        if not isinstance(attrs, PoolAttrs) or (attrs.window is None and not attrs.axes):
            raise NotEmittable(op.id, op.type, "its windows aren't known")
        if attrs.window is None:
            return _reduced(sheet, op, "ReduceMax" if largest else "ReduceMean", attrs.axes, attrs.keepdims)
    place = layout_of(sheet, op)
    given = attributes_of(op) or window(attrs.window)  # type: ignore[union-attr, arg-type]
    if not largest:
        inside = isinstance(attrs, PoolAttrs) and attrs.count_include_pad
        given.setdefault("count_include_pad", int(inside))
    return place.back(sheet.node(op, op.type, place.to_onnx(sheet.values[op.data_inputs[0]]), **given))


def reduction(sheet: Sheet, op: Op) -> ir.Value:
    """A reduction over constant axes; the mean or maximum over all but samples and channels is a global pool."""
    if isinstance(op.attrs, PoolAttrs) and op.attrs.axes:
        return _reduced(sheet, op, op.type, op.attrs.axes, op.attrs.keepdims)
    held = (*operands(op), None)[1]
    axes = held.array.reshape(-1).tolist() if isinstance(held, Constant) else None
    keep = bool(attributes_of(op)["keepdims"])
    if not axes:  # computed, or all: without axes
        return plain(sheet, op)[0]
    return _reduced(sheet, op, op.type, axes, keep)


def _reduced(sheet: Sheet, op: Op, type: str, axes: Sequence[int], keep: bool) -> ir.Value:
    x = op.data_inputs[0]
    rank = sheet.rank(op, x)
    known = sorted({axis % rank for axis in axes})
    left = [i for i in range(rank) if i not in known]
    if type in ("ReduceMean", "ReduceMax") and len(left) == 2 and left[0] == 0 and (rank == 4 or "Global" in op.type):
        place = Layout(sheet, op, left[1], rank)
        y = sheet.node(
            op, "GlobalAveragePool" if type == "ReduceMean" else "GlobalMaxPool", place.to_onnx(sheet.values[x])
        )
        return place.back(y) if keep else sheet.node(op, "Squeeze", y, sheet.literal(op, tuple(range(2, rank))))
    return sheet.node(op, type, sheet.values[x], sheet.literal(op, tuple(known)), keepdims=int(keep))


def reshape(sheet: Sheet, op: Op) -> ir.Value:
    """Reshape and its kin: to the shape that stands there, else to the output's."""
    x, *given = sheet.operands(op)
    if given and given[0] is not None:
        return sheet.node(op, op.type, x, *given, **attributes_of(op))
    shape = sheet.shape(op.output)
    if shape is None:
        raise NotEmittable(op.id, op.type, "the shape of its output isn't known")
    target = tuple(-1 if n is None else n for n in shape)
    return sheet.node(op, "Reshape", x, sheet.literal(op, np.array(target, np.int64)))


def part(sheet: Sheet, op: Op) -> ir.Value:
    """Slice; with `squeeze`, axes of which one element is left go; with `unsqueeze`, some of the result are new."""
    given = attributes_of(op)
    gone, new = given.pop("squeeze", ()), given.pop("unsqueeze", ())
    y = sheet.node(op, "Slice", *sheet.operands(op), **given)
    y = sheet.node(op, "Squeeze", y, sheet.literal(op, gone)) if gone else y
    return sheet.node(op, "Unsqueeze", y, sheet.literal(op, new)) if new else y


def transpose(sheet: Sheet, op: Op) -> ir.Value:
    """A permutation."""
    return sheet.node(op, "Transpose", sheet.values[op.data_inputs[0]], perm=attributes_of(op)["perm"])


def blocks(sheet: Sheet, op: Op) -> ir.Value:
    """DepthToSpace and SpaceToDepth."""
    place = layout_of(sheet, op)
    return place.back(sheet.node(op, op.type, place.to_onnx(sheet.values[op.data_inputs[0]]), **attributes_of(op)))


def resize(sheet: Sheet, op: Op) -> ir.Value:
    """Resize with constant factors or sizes, one for each axis, or for those that `axes` names; or to computed sizes.

    Whole factors are written as such; other sizes behind those of samples and channels, read at run time. (ONNX
    Runtime moves Transposes through Resize, and forgets its `axes` then.)
    """
    held, place = [*operands(op), None, None, None][:4], layout_of(sheet, op)
    named = attributes_of(op)
    axes = named.pop("axes", tuple(range(place.rank)))
    factors, sizes = (h.array.reshape(-1).tolist() if isinstance(h, Constant) else None for h in held[2:])
    factors = factors or None  # no factors stand for absent ones, as in ONNX
    odd = held[3] is not None and named.pop("keep_aspect_ratio_policy", "stretch") != "stretch"
    regions = (isinstance(held[1], Constant) and held[1].array.size) or isinstance(held[1], str)
    if odd or regions or isinstance(held[2], str):
        if place.native:
            return plain(sheet, op)[0]
        raise NotEmittable(op.id, op.type, "its channels aren't on axis 1, and its factors or regions are computed, or "
                           "it keeps the aspect ratio")  # fmt: skip
    source = sheet.shape(op.data_inputs[0]) or ()
    x = sheet.values[op.data_inputs[0]]
    taken, made = (onnx_type(sheet.graph.tensors[t].dtype) for t in (op.data_inputs[0], op.output))
    if taken != made:  # TensorFlow makes floats of bytes
        x = sheet.node(op, "Cast", x, to=int(made))
    x = place.to_onnx(x)
    scales: dict[int, float] = {}
    if isinstance(held[3], str):
        last = list(place.order[-len(axes) :])
        if last != [axis % place.rank for axis in axes]:
            raise NotEmittable(op.id, op.type, "it has computed sizes of some axes that aren't the last ones")
        return _to_sizes(sheet, op, place, x, sheet.whole(op, sheet.values[held[3]]), len(axes), named)
    if factors is None and sizes is None:
        raise NotEmittable(op.id, op.type, "it has no sizes")
    if factors is not None:
        scales = {axis % place.rank: n for axis, n in zip(axes, factors, strict=True)}
    else:
        wanted = {axis % place.rank: int(n) for axis, n in zip(axes, sizes or (), strict=True)}
        for axis, size in wanted.items():
            known = source[axis]
            if known is not None and size % known == 0:
                scales[axis] = size // known
        if set(scales) != set(wanted):
            left = [i for i in place.order if i not in wanted]
            if left != list(place.order[: len(left)]):
                raise NotEmittable(op.id, op.type, "it has sizes of some axes that aren't the last ones")
            given = sheet.literal(op, np.array([wanted[i] for i in place.order[len(left) :]], np.int64))
            return _to_sizes(sheet, op, place, x, given, len(wanted), named)
    whole = sheet.literal(op, np.array([scales.get(i, 1) for i in place.order], np.float32))
    return place.back(sheet.node(op, "Resize", x, None, whole, **named))


def _to_sizes(
    sheet: Sheet, op: Op, place: Layout, x: ir.Value, sizes: ir.Value, count: int, named: Mapping[str, Any]
) -> ir.Value:
    """Resize the last axes of ONNX's layout; the sizes of the others are read at run time."""
    if count < place.rank:
        head = sheet.node(op, "Shape", x, start=0, end=place.rank - count)
        sizes = sheet.node(op, "Concat", head, sizes, axis=0)
    return place.back(sheet.node(op, "Resize", x, None, None, sizes, **named))
