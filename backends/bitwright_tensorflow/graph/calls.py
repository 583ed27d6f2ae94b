"""What nodes compute, in ONNX's words (`Op.call`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bitwright.graph import Call, Constant, OpKind, ParamRole
from bitwright_tensorflow.graph.geometry import channel_axis
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.model import NodeDef
from bitwright_tensorflow.graph.network import Network
from bitwright_tensorflow.graph.optable import KINDS
from bitwright_tensorflow.graph.recognized import Recognized

Operands = dict[int, Constant | ParamRole]
LAST, FIRST = np.iinfo(np.int64).max, np.iinfo(np.int64).min

COMPARISONS: Mapping[str, str] = {
    "Greater": "Greater", "GreaterEqual": "GreaterOrEqual", "Less": "Less", "LessEqual": "LessOrEqual",
    "Equal": "Equal", "LogicalAnd": "And", "LogicalOr": "Or", "LogicalNot": "Not",
}  # fmt: skip
"""Of numbers or truths, by TensorFlow's name."""
_OTHERWISE = frozenset({"DivNoNan", "FloorMod", "Mod", "Select", "LRN"})
"""Ops whose canonical type is ONNX's name of something else in places (x / 0, signs, vector conditions)."""


def call_of(net: Network, found: Recognized) -> Call | None:
    """What kind, type, attributes and parameters of a recognized op leave open.

    An op of which no words are known, but whose type ONNX knows, gets a call of TensorFlow's own type: it isn't
    written then, rather than written wrongly.
    """
    if found.call is not None or len(found.nodes) != 1 or not found.inputs:
        return found.call
    node = net.node(found.nodes[0])
    type = COMPARISONS.get(node.op, KINDS.get(node.op, (OpKind.OPAQUE, ""))[1])
    if node.op in _OTHERWISE:
        return Call(type=f"tf.{node.op}")
    if found.kind is OpKind.OPAQUE and node.op == "Cast":
        return Call(type="Cast")
    maker = _MAKERS.get(node.op)
    if maker is None:
        named = found.kind is OpKind.OPAQUE and bool(type)
        return Call(type=type) if named and type in ("Reshape", "Squeeze", "Unsqueeze") else None
    made = maker(net, node, found)
    if made is None:
        return Call(type=f"tf.{node.op}")
    return Call(made.attributes, made.operands, made.type or type) if found.kind is OpKind.OPAQUE else made


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
        value = net.value(net.resolve(tensor))
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
    axes = net.ints(net.operands(node)[1])
    return None if axes is None else Call({"keepdims": int(net.attr(node, "keep_dims", False))}, {1: Constant(axes)})


def _running(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    axis = net.ints(net.operands(node)[1])
    if axis is None:
        return None
    flags = {name: int(net.attr(node, name, False)) for name in ("exclusive", "reverse")}
    return Call(flags, {1: Constant(np.array(axis[0], np.int64))})


def _concat(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    tensors = data_operands(node)
    parts = tensors if node.op == "Pack" else tensors[1:] if node.op == "Concat" else tensors[:-1]
    operands: Operands = {}
    for index, tensor in enumerate(parts):
        if net.is_data(tensor):
            continue
        value = net.value(net.resolve(tensor))
        if ParamRole.CONSTANT in found.reads and not operands:
            operands[index] = ParamRole.CONSTANT
        elif value is not None:
            operands[index] = Constant(np.asarray(value))
        else:
            return None
    return Call({"new_axis": 1} if node.op == "Pack" else {}, operands)


def _split(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    return Call({"squeeze": 1} if node.op == "Unpack" else {})


def _resized(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    sizes = net.ints(net.operands(node)[1])
    if sizes is None:
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
    return Call({**mode, "axes": (1, 2), "channel_axis": 3}, {3: Constant(sizes)})


def _reshaped(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    target = net.ints(net.operands(node)[1]) if not net.is_data(net.operands(node)[1]) else None
    if target is None or any(n < -1 for n in target) or target.count(-1) > 1:
        return Call()  # to the output's shape, if that is known
    return Call({"allowzero": 1} if 0 in target else {}, {1: Constant(target)})


def _formed(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    return Call()


def _by_operand(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    given = net.ints(net.operands(node)[1])
    return None if given is None or min(given, default=1) < 1 else Call(operands={1: Constant(given)})


def _blocks(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    mode = {"mode": "DCR"} if node.op == "DepthToSpace" else {}
    axis = channel_axis(net.attr(node, "data_format", "NHWC"), 4)
    return Call({"blocksize": net.attr(node, "block_size"), "channel_axis": axis, **mode})


def _transposed(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    order = net.ints(net.operands(node)[1])
    return None if order is None else Call({"perm": order})


def _sliced(starts: Any, ends: Any, axes: Any, steps: Any, **attributes: Any) -> Call:
    given = enumerate((starts, ends, axes, steps), 1)
    return Call(attributes, {i: Constant([int(n) for n in numbers]) for i, numbers in given})


def _part(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    begin, size = (net.ints(t) for t in net.operands(node)[1:3])
    if begin is None or size is None:
        return None
    ends = [LAST if n == -1 else b + n for b, n in zip(begin, size, strict=True)]
    return _sliced(begin, ends, range(len(begin)), [1] * len(begin))


def _strided(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    numbers = [net.ints(t) for t in net.operands(node)[1:4]]
    rank = net.rank(net.operands(node)[0])
    masks = {n: net.attr(node, f"{n}_mask", 0) for n in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    if any(n is None for n in numbers) or masks["new_axis"] or rank is None:
        return None
    begin, end, steps = (n or () for n in numbers)
    axes = list(range(len(begin)))
    if masks["ellipsis"]:
        at = masks["ellipsis"].bit_length() - 1
        axes = [*axes[:at], -1, *range(rank - len(begin) + at + 1, rank)]
    found_parts, gone = [], []
    for i, axis in enumerate(axes):
        bit = 1 << i
        if axis < 0:
            continue
        if masks["shrink_axis"] & bit:
            gone.append(axis)
            found_parts.append((begin[i], begin[i] + 1 or LAST, axis, 1))
            continue
        step = steps[i]
        start = (0 if step > 0 else LAST) if masks["begin"] & bit else begin[i]
        stop = (LAST if step > 0 else FIRST) if masks["end"] & bit else end[i]
        found_parts.append((start, stop, axis, step))
    if not found_parts:
        return _sliced([0], [LAST], [0], [1])
    return _sliced(*zip(*found_parts, strict=True), **({"squeeze": tuple(gone)} if gone else {}))


def _reversed(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    axes = net.ints(net.operands(node)[1])
    if axes is None:
        return None
    count = len(axes)
    return _sliced([-1] * count, [FIRST] * count, axes, [-1] * count)


def _gathered(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    if net.attr(node, "batch_dims", 0) or ParamRole.WEIGHT in found.reads:
        return Call() if ParamRole.WEIGHT in found.reads else None
    tensors = net.operands(node)
    axis = (0,) if node.op == "Gather" else net.ints(tensors[2])
    held: Operands = {}
    for index in (0, 1):
        if not net.is_data(tensors[index]):
            value = net.value(tensors[index])
            if value is None:
                return None
            held[index] = Constant(np.asarray(value))
    return None if axis is None else Call({"axis": axis[0]}, held)


def _padded(net: Network, node: NodeDef, found: Recognized) -> Call | None:
    pads = net.value(net.operands(node)[1])
    mode = {"REFLECT": "reflect", "": "constant"}.get(net.attr(node, "mode", ""))
    if pads is None or mode is None:
        return None
    held: Operands = {1: Constant(np.asarray(pads, np.int64).T.reshape(-1))}
    if node.op == "PadV2":
        if net.is_data(net.operands(node)[2]):
            return None
        value = net.value(net.operands(node)[2])
        if ParamRole.CONSTANT in found.reads:
            held[2] = ParamRole.CONSTANT
        elif value is not None and np.any(value):
            held[2] = Constant(np.asarray(value))
    return Call({"mode": mode}, held)


_MAKERS: Mapping[str, Maker] = {
    **dict.fromkeys(
        ("Add", "AddV2", "AddN", "Mul", "Square", "Sub", "RealDiv", "Div", "Maximum", "Minimum", "Pow", "SelectV2",
         "SquaredDifference", "MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", *COMPARISONS),
        _operands,
    ),
    "BiasAdd": _biased,
    "Einsum": _einsum,
    "Rsqrt": _power,
    **dict.fromkeys(("Sum", "Prod", "EuclideanNorm", "Max", "Min"), _reduced),
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
    **dict.fromkeys(("ResizeBicubic", "ResizeArea", "ScaleAndTranslate", "GatherNd", "ParallelConcat"),
                    lambda net, node, found: None),
}  # fmt: skip
"""By TensorFlow's name of the op."""
