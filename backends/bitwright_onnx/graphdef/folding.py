"""Computing in advance what depends on constants: weights that are only moved, and the arithmetic of shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright_onnx.graphdef.builder import Builder, Constant
from bitwright_onnx.graphdef.nodes import NUMPY_TYPES, Node

SMALL = 256
"""Elements of a constant that is computed rather than moved: shapes, axes and their like."""

_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "Add": np.add, "AddV2": np.add, "Sub": np.subtract, "Mul": np.multiply, "FloorDiv": np.floor_divide,
    "FloorMod": np.mod, "Maximum": np.maximum, "Minimum": np.minimum, "Neg": np.negative, "Range": np.arange,
}  # fmt: skip


def fold(g: Builder, node: Node) -> bool:
    """Note a node's output as a constant where it is one; weights that are only moved keep their own names."""
    if node.op in ("Shape", "Rank", "Size"):
        made = _of_shape(g, node)
        if made is None:
            return False
        g.constants[node.output()] = Constant(made, None)
        return True
    arrays = [g.known(i) for i in node.inputs]
    if not arrays or any(a is None for a in arrays):
        return False
    known = [np.asarray(a) for a in arrays]
    moved = _moved(node, known)
    if moved is not None:
        origin = g.constants[node.inputs[0]].origin
        if node.output() in g.names:
            origin = node.output()
        if moved.dtype != known[0].dtype:
            origin = None
        g.constants[node.output()] = Constant(moved, origin)
        return True
    if any(a.size > SMALL or a.dtype.kind not in "iu" for a in known):
        return False
    computed = _computed(node, known)
    if computed is None:
        return False
    g.constants[node.output()] = Constant(computed.astype(known[0].dtype, copy=False), None)
    return True


def _of_shape(g: Builder, node: Node) -> NDArray[Any] | None:
    shape = g.shape(node.inputs[0])
    if shape is None:
        return None
    if node.op == "Rank":
        return np.asarray(len(shape), np.int32)
    if None in shape:
        return None
    sizes = np.asarray(shape, np.int32)
    return sizes if node.op == "Shape" else np.asarray(sizes.prod(), np.int32)


def _moved(node: Node, arrays: list[NDArray[Any]]) -> NDArray[Any] | None:
    first, *rest = arrays
    match node.op:
        case "Identity" | "StopGradient" | "Snapshot" | "EnsureShape" | "PreventGradient":
            return first
        case "Reshape":
            return first.reshape([int(i) for i in np.reshape(rest[0], -1)])
        case "ExpandDims":
            return np.expand_dims(first, int(np.reshape(rest[0], -1)[0]))
        case "Squeeze":
            return np.squeeze(first, node.integers("squeeze_dims") or None)
        case "Transpose":
            return first.transpose([int(i) for i in rest[0]])
        case "Cast":
            return first.astype(NUMPY_TYPES[node.dtype("DstT")])
    return None


def _computed(node: Node, arrays: list[NDArray[Any]]) -> NDArray[Any] | None:
    if node.op in _ARITHMETIC:
        return np.asarray(_ARITHMETIC[node.op](*arrays))
    match node.op:
        case "Pack":
            return np.stack(arrays, node.integer("axis"))
        case "ConcatV2":
            return np.concatenate(arrays[:-1], int(arrays[-1]))
        case "Prod":
            return np.asarray(np.prod(arrays[0], tuple(np.reshape(arrays[1], -1)), keepdims=node.flag("keep_dims")))
        case "GatherV2" if not node.integer("batch_dims"):
            return np.take(arrays[0], arrays[1], int(arrays[2]))
        case "Fill":
            return np.full(tuple(arrays[0]), arrays[1])
        case "StridedSlice" if arrays[0].ndim == 1 and len(arrays[1]) == 1 and not node.integer("new_axis_mask"):
            begin, end, step = (int(a[0]) for a in arrays[1:])
            if node.integer("shrink_axis_mask"):
                return np.asarray(arrays[0][begin])
            start = None if node.integer("begin_mask") else begin
            return arrays[0][start : None if node.integer("end_mask") else end : step]
    return None
