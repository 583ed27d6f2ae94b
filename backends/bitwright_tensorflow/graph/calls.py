"""What nodes compute, in ONNX's words (`Op.call`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bitwright.graph import Call, Constant, OpKind, ParamRole, PoolAttrs
from bitwright_tensorflow.graph.geometry import channel_axis, spatial_axes, window_pads
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.model import NodeDef
from bitwright_tensorflow.graph.network import PASSING, Network
from bitwright_tensorflow.graph.optable import KINDS
from bitwright_tensorflow.graph.recognized import Recognized

Operands = dict[int, Constant | ParamRole]
LAST, FIRST = np.iinfo(np.int64).max, np.iinfo(np.int64).min

WORDS: Mapping[str, str] = {
    "Greater": "Greater", "GreaterEqual": "GreaterOrEqual", "Less": "Less", "LessEqual": "LessOrEqual",
    "Equal": "Equal", "LogicalAnd": "And", "LogicalOr": "Or", "LogicalNot": "Not", "IsNan": "IsNaN", "IsInf": "IsInf",
    "FloorMod": "FloorMod", "DivNoNan": "DivNoNan", "ShapeN": "Shape", "FloorDiv": "FloorDiv",
    **dict.fromkeys(("NotEqual", "Xlogy", "Range", "Shape", "Size", "ZerosLike", "OnesLike"), ""),
}  # fmt: skip
"""What takes its operands as they stand, by TensorFlow's name: the type that calls give it, "" for the same."""
_OTHERWISE = frozenset({"Mod", "LRN"})
"""Ops whose canonical type is ONNX's name of something else in places (signs)."""


def call_of(net: Network, found: Recognized) -> Call | None:
    """What kind, type, attributes and parameters of a recognized op leave open.

    An op of which no words are known, but whose type ONNX knows, gets a call of TensorFlow's own type: it isn't
    written then, rather than written wrongly.
    """
    if found.call is not None or len(found.nodes) != 1 or not found.inputs:
        return found.call
    node = net.node(found.nodes[0])
    if ParamRole.WEIGHT in found.reads and found.kind is not OpKind.EMBEDDING:
        return None
    type = (WORDS[node.op] or node.op) if node.op in WORDS else KINDS.get(node.op, (OpKind.OPAQUE, ""))[1]
    if node.op in _OTHERWISE:
        return Call(type=f"tf.{node.op}")
    if found.kind is OpKind.OPAQUE and (node.op == "Cast" or node.op in PASSING):
        return Call(type="Cast" if node.op == "Cast" else "Identity")
    maker = _MAKERS.get(node.op)
    if maker is None:
        named = found.kind is OpKind.OPAQUE and bool(type)
        return Call(type=type) if named and type in ("Reshape", "Squeeze", "Unsqueeze") else None
    made = maker(net, node, found)
    if made is None:
        return Call(type=f"tf.{node.op}")
    if found.kind is OpKind.OPAQUE or node.op in WORDS:
        return Call(made.attributes, made.operands, made.type or type)
    return made


Maker = Callable[[Network, NodeDef, Recognized], Call | None]


def _operands(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    """Constant operands at their places."""
    held = next((role for role in found.reads if role is ParamRole.CONSTANT), None)
    operands: Operands = {}
    for index, tensor in enumerate(data_operands(node)):
        if net.is_data(tensor):
            continue
        read = net.read(node, index) if held is not None and held not in operands.values() else None
        if read is not None and held is not None and read.source == found.reads[held].source:
            operands[index] = held
            continue
        value = net.known(net.resolve(tensor))
        if value is None:
            return None
        operands[index] = Constant(np.asarray(value))
    return Call(operands=operands)


def _biased(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    return None if net.attr(node, "data_format", "NHWC").startswith("NC") else _operands(net, node, found)


def _einsum(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    made = _operands(net, node, found)
    equation = str(net.attr(node, "equation", "")).replace(" ", "")
    return None if made is None or "->" not in equation else Call({"equation": equation}, made.operands)


def _power(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    return Call(operands={1: Constant(-0.5)})


def _reduced(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    axes = net.whole(net.operands(node)[1])
    return None if axes is None else Call({"keepdims": int(net.attr(node, "keep_dims", False))}, {1: Constant(axes)})


def _running(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    axis = net.whole(net.operands(node)[1])
    if axis is None:
        return None
    flags = {name: int(net.attr(node, name, False)) for name in ("exclusive", "reverse")}
    return Call(flags, {1: Constant(np.array(axis[0], np.int64))})


def _counted(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    """The place of the largest or smallest."""
    axis = net.whole(net.operands(node)[1])
    return None if axis is None else Call({"axis": axis[0], "keepdims": 0}, type=node.op)


def _truths(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    made = _reduced(net, node, found)
    return None if made is None else Call(made.attributes, made.operands, f"Reduce{node.op}")


def _filled(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    """Fill: a number in some shape."""
    sizes, number = net.operands(node)
    held: Operands = {}
    for index, tensor in ((0, number), (1, sizes)):
        if not net.is_data(tensor):
            value = net.known(tensor)
            if value is None:
                return None
            held[index] = Constant(np.asarray(value) if index == 0 else [int(n) for n in value])
    return Call(operands=held, type="Expand") if held else None


def _gathered_points(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    made = _operands(net, node, found)
    return None if made is None else replace(made, type="GatherND")


def _chosen(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    """Select; a vector of conditions chooses whole rows there, and no columns as in ONNX."""
    ranks = [net.rank(t) for t in net.operands(node)[:2]]
    return _operands(net, node, found) if None not in ranks and ranks[0] in (0, ranks[1]) else None


def _pooled(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    """Windows whose padding follows from sizes that are free."""
    if not isinstance(found.attrs, PoolAttrs) or found.attrs.window is not None:
        return Call() if found.attrs is not None else None
    rank = 5 if node.op.endswith("3D") else 4
    axes = spatial_axes(net.attr(node, "data_format", "NHWC"), rank)
    kernel, strides = (tuple((net.attr(node, n) or [1] * rank)[a] for a in axes) for n in ("ksize", "strides"))
    return Call({"kernel_shape": kernel, "strides": strides, "auto_pad": "SAME_UPPER"})


def _convolved(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    """By a filter that is an activation itself."""
    (x, kernel), rank = net.operands(node), net.rank(net.operands(node)[0])
    shape, data_format = net.shape(kernel), net.attr(node, "data_format", "NHWC")
    if rank is None or shape is None or None in shape or not net.is_data(kernel) or not net.is_data(x):
        return None
    axes = spatial_axes(data_format, rank)
    strides, dilations = ([(net.attr(node, n) or [1] * rank)[a] for a in axes] for n in ("strides", "dilations"))
    sizes, size = [(net.shape(x) or ())[a] for a in axes], [int(n or 0) for n in shape[:-2]]
    explicit = net.attr(node, "explicit_paddings") or []
    pads = window_pads(net.attr(node, "padding"), explicit, axes, sizes, size, strides, dilations)
    axis = channel_axis(data_format, rank)
    channels = (net.shape(x) or ())[axis]
    if pads is None or channels is None:
        return None
    window = {"strides": strides, "dilations": dilations, "pads": [*(p[0] for p in pads), *(p[1] for p in pads)]}
    n = len(size)
    given: dict[str, Any] = {name: tuple(numbers) for name, numbers in window.items()}
    given |= {"group": channels // int(shape[-2] or 1), "channel_axis": axis, "kernel_order": (n + 1, n, *range(n))}
    return Call(given, type="ConvOfTensors")


def _one_hot(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    values = [net.known(t) if not net.is_data(t) else None for t in net.operands(node)[1:]]
    if any(v is None for v in values):
        return None
    depth, on, off = (np.asarray(v) for v in values)
    held: Operands = {1: Constant(np.asarray(depth, np.int64)), 2: Constant(np.stack([off, on]))}
    return Call({"axis": net.attr(node, "axis", -1)}, held, "OneHot")


def _largest(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    count = net.whole(net.operands(node)[1])
    if count is None:
        return None
    return Call({"axis": -1, "sorted": int(net.attr(node, "sorted", True))}, {1: Constant(count)}, "TopK")


def _buckets(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    limits = [float(n) for n in node.attr["boundaries"].list.f]
    return Call(operands={1: Constant(np.asarray(limits, np.float32))}, type="Bucketize")


def _concat(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    tensors = data_operands(node)
    parts = tensors if node.op == "Pack" else tensors[1:] if node.op == "Concat" else tensors[:-1]
    operands: Operands = {}
    for index, tensor in enumerate(parts):
        if net.is_data(tensor):
            continue
        value = net.known(net.resolve(tensor))
        if ParamRole.CONSTANT in found.reads and not operands:
            operands[index] = ParamRole.CONSTANT
        elif value is not None:
            operands[index] = Constant(np.asarray(value))
        else:
            return None
    given: dict[str, Any] = {"new_axis": 1} if node.op == "Pack" else {}
    if found.kind is OpKind.OPAQUE:  # of whole numbers
        place = tensors[0 if node.op == "Concat" else -1]
        axis = (net.attr(node, "axis", 0),) if node.op == "Pack" else net.whole(place)
        if axis is None:
            return None
        given["axis"] = axis[0]
    return Call(given, operands)


def _split(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    if found.kind is OpKind.OPAQUE:
        return None
    if node.op == "Unpack":
        return Call({"squeeze": 1})
    sizes = net.whole(net.operands(node)[1]) if node.op == "SplitV" else None
    return Call(operands={1: Constant(sizes)}) if sizes is not None and min(sizes) >= 0 else Call()


def _resized(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    sizes = net.whole(net.operands(node)[1])
    if sizes is None and not net.is_data(net.operands(node)[1]):
        return None
    how = "asymmetric"
    if net.attr(node, "align_corners", False):
        how = "align_corners"
    elif net.attr(node, "half_pixel_centers", False):
        how = "half_pixel"
    mode: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": how}
    if node.op == "ResizeNearestNeighbor":
        # floor((i + 0.5)·scale) is the half-pixel coordinate rounded with its ties up.
        mode |= {"mode": "nearest", "nearest_mode": "floor" if how == "asymmetric" else "round_prefer_ceil"}
    absent, given = Constant(np.zeros(0, np.float32)), {**mode, "axes": (1, 2), "channel_axis": 3}
    return Call(given, {1: absent, 2: absent} if sizes is None else {3: Constant(sizes)})


def _reshaped(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    target = net.whole(net.operands(node)[1]) if not net.is_data(net.operands(node)[1]) else None
    if target is None or any(n < -1 for n in target) or target.count(-1) > 1:
        return Call()  # to the output's shape, if that is known
    return Call({"allowzero": 1} if 0 in target else {}, {1: Constant(target)})


def _formed(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    """To the output's shape; by axes where that is free."""
    axes = net.attr(node, "squeeze_dims") if node.op == "Squeeze" else net.whole(net.operands(node)[1])
    shape = net.shape(found.outputs[0])
    return Call(operands={1: Constant(axes)}) if axes and (shape is None or shape.count(None) > 1) else Call()


def _by_operand(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    given = net.whole(net.operands(node)[1])
    if net.is_data(net.operands(node)[1]):
        return Call()
    return None if given is None or min(given, default=1) < 1 else Call(operands={1: Constant(given)})


def _blocks(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    mode = {"mode": "DCR"} if node.op == "DepthToSpace" else {}
    axis = channel_axis(net.attr(node, "data_format", "NHWC"), 4)
    return Call({"blocksize": net.attr(node, "block_size"), "channel_axis": axis, **mode})


def _transposed(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    order = net.whole(net.operands(node)[1])
    return None if order is None else Call({"perm": order})


def _sliced(starts: Any, ends: Any, axes: Any, steps: Any, **attributes: Any) -> Call:
    given = enumerate((starts, ends, axes, steps), 1)
    return Call(attributes, {i: Constant([int(n) for n in numbers]) for i, numbers in given})


def _part(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    begin, size = (net.whole(t) for t in net.operands(node)[1:3])
    if begin is None or size is None:
        return None
    ends = [LAST if n == -1 else b + n for b, n in zip(begin, size, strict=True)]
    return _sliced(begin, ends, range(len(begin)), [1] * len(begin))


def _strided(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    numbers = [net.whole(t) for t in net.operands(node)[1:4]]
    rank = net.rank(net.operands(node)[0])
    masks = {n: net.attr(node, f"{n}_mask", 0) for n in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    if any(n is None for n in numbers) or rank is None:
        return None
    begin, end, steps = (n or () for n in numbers)
    used = sum(not (masks["new_axis"] | masks["ellipsis"]) >> i & 1 for i in range(len(begin)))
    found_parts: list[tuple[int, int, int, int]] = []
    gone: list[int] = []
    new: list[int] = []
    axis, result = -1, 0  # of the operand; of what comes out
    for i in range(len(begin)):
        bit = 1 << i
        if masks["ellipsis"] & bit:
            axis, result = axis + rank - used, result + rank - used
            continue
        if masks["new_axis"] & bit:
            new.append(result)
            result += 1
            continue
        axis += 1
        result += not masks["shrink_axis"] & bit
        if masks["shrink_axis"] & bit:
            gone.append(axis)
            found_parts.append((begin[i], begin[i] + 1 or LAST, axis, 1))
            continue
        step = steps[i]
        start = (0 if step > 0 else LAST) if masks["begin"] & bit else begin[i]
        stop = (LAST if step > 0 else FIRST) if masks["end"] & bit else end[i]
        found_parts.append((start, stop, axis, step))
    changed = {name: tuple(axes) for name, axes in (("squeeze", gone), ("unsqueeze", new)) if axes}
    if not found_parts:
        return _sliced([0], [LAST], [0], [1], **changed)
    return _sliced(*zip(*found_parts, strict=True), **changed)


def _reversed(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    axes = net.whole(net.operands(node)[1])
    if axes is None:
        return None
    count = len(axes)
    return _sliced([-1] * count, [FIRST] * count, axes, [-1] * count)


def _gathered(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    if net.attr(node, "batch_dims", 0) or ParamRole.WEIGHT in found.reads:
        return Call() if ParamRole.WEIGHT in found.reads else None
    tensors = net.operands(node)
    axis = (0,) if node.op == "Gather" else net.whole(tensors[2])
    held: Operands = {}
    for index in (0, 1):
        if not net.is_data(tensors[index]):
            value = net.known(tensors[index])
            if value is None:
                return None
            held[index] = Constant(np.asarray(value))
    return None if axis is None else Call({"axis": axis[0]}, held)


def _padded(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    pads = net.known(net.operands(node)[1])
    if pads is None:
        return None
    mode = {"REFLECT": "reflect", "SYMMETRIC": "edge"}.get(net.attr(node, "mode", ""), "constant")
    if mode == "edge" and np.any(np.asarray(pads) > 1):
        return None  # by one, the edge is what is mirrored
    held: Operands = {1: Constant(np.asarray(pads, np.int64).T.reshape(-1))}
    if node.op == "PadV2":
        if net.is_data(net.operands(node)[2]):
            return None
        value = net.known(net.operands(node)[2])
        if ParamRole.CONSTANT in found.reads:
            held[2] = ParamRole.CONSTANT
        elif value is not None and np.any(value):
            held[2] = Constant(np.asarray(value))
    return Call({"mode": mode}, held)


_MAKERS: Mapping[str, Maker] = {
    **dict.fromkeys(
        ("Add", "AddV2", "AddN", "Mul", "Square", "Sub", "RealDiv", "Div", "Maximum", "Minimum", "Pow", "SelectV2",
         "SquaredDifference", "MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", *WORDS),
        _operands,
    ),
    "BiasAdd": _biased,
    "Einsum": _einsum,
    "Rsqrt": _power,
    **dict.fromkeys(("Sum", "Prod", "EuclideanNorm", "Max", "Min"), _reduced),
    **dict.fromkeys(("All", "Any"), _truths),
    **dict.fromkeys(("ArgMax", "ArgMin"), _counted),
    "Fill": _filled,
    "OneHot": _one_hot,
    "TopKV2": _largest,
    "Bucketize": _buckets,
    "GatherNd": _gathered_points,
    **dict.fromkeys(("AvgPool", "AvgPool3D", "MaxPool", "MaxPool3D"), _pooled),
    **dict.fromkeys(("Conv2D", "Conv3D"), _convolved),
    "Select": _chosen,
    "Cumsum": _running,
    **dict.fromkeys(("ConcatV2", "Concat", "Pack"), _concat),
    **dict.fromkeys(("Split", "SplitV", "Unpack"), _split),
    **dict.fromkeys(("ResizeBilinear", "ResizeNearestNeighbor"), _resized),
    "Reshape": _reshaped,
    **dict.fromkeys(("ExpandDims", "Squeeze"), _formed),
    **dict.fromkeys(("BroadcastTo", "Tile"), _by_operand),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _blocks),
    "Transpose": _transposed,
    "Slice": _part,
    "StridedSlice": _strided,
    "ReverseV2": _reversed,
    **dict.fromkeys(("Gather", "GatherV2"), _gathered),
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _padded),
    **dict.fromkeys(("ResizeBicubic", "ResizeArea", "ScaleAndTranslate", "ParallelConcat"),
                    lambda net, node, found: None),
}  # fmt: skip
"""By TensorFlow's name of the op."""
