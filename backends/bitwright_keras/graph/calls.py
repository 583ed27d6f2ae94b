"""What a call of a layer or operation computes, in ONNX's words (`Op.call`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np

from bitwright.graph import FLOAT_DTYPES, AttributeValue, Call, Constant, ParamRole
from bitwright_keras.graph import attributes
from bitwright_keras.graph.attributes import setting
from bitwright_keras.graph.model import Node, Ref, Spec

Specs = Mapping[str, Spec]
Operands = dict[int, Constant | ParamRole]


def call_of(node: Node, type: str, specs: Specs, roles: Iterable[ParamRole] = ()) -> Call | None:
    """What the canonical op's kind, type, attributes and parameters leave open.

    Args:
        node: the call.
        type: the op's.
        specs: of all activations.
        roles: of the op's parameters.

    Returns:
        None where there is nothing to say, or no words for it.
    """
    maker = _BY_CLASS.get(node.type) or _BY_TYPE.get(type)
    if maker is None or not node.inputs:
        return None
    return maker(node, specs, frozenset(roles))


def opaque_call(node: Node, type: str, specs: Specs) -> Call | None:
    """The same of a call that techniques don't look into, such as of whole numbers and masks; `type` is ONNX's name for
    it, or "" where that is another one."""
    named = (COMPARISONS[node.type] or node.type) if node.type in COMPARISONS else type
    if not (named or node.type in _BY_CLASS) or not node.inputs:
        return None
    made = _operands(node, specs, frozenset()) if node.type in COMPARISONS else call_of(node, named, specs)
    if made is None:
        return Call(type=named) if named in ("Cast", "Reshape", "Squeeze", "Unsqueeze") else None
    return Call(made.attributes, made.operands, made.type or named)


COMPARISONS: Mapping[str, str] = {
    "Greater": "Greater",
    "GreaterEqual": "GreaterOrEqual",
    "Less": "Less",
    "LessEqual": "LessOrEqual",
    "Equal": "Equal",
    "LogicalAnd": "And",
    "LogicalOr": "Or",
    "LogicalNot": "Not",
    "Isnan": "IsNaN",
    **dict.fromkeys(("NotEqual", "ZerosLike", "OnesLike"), ""),
}
"""By class of the operation; "": ONNX has several ops for it."""

Maker = Callable[[Node, Specs, frozenset[ParamRole]], Call | None]


def _of(node: Node, specs: Specs) -> tuple[attributes.Shape, attributes.Shape]:
    return specs[node.inputs[0]].shape, specs[node.outputs[0]].shape


def _axes(node: Node, rank: int, given: Any) -> list[int]:
    chosen = range(rank) if given is None else given if isinstance(given, list | tuple) else [given]
    return [int(a) % rank for a in chosen]


def _said(attribute: str, name: str, position: int | None = None, default: Any = None) -> Maker:
    """One number, under another name."""

    def make(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
        value = setting(node, name, position, default)
        return None if value is None else Call({attribute: float(value)})

    return make


def _operands(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    """Constant operands at their places; the first one is the parameter, if the op has one."""
    leaves = [leaf for leaf in keras.tree.flatten((node.args, node.kwargs)) if leaf is not None]
    found: Operands = {}
    wanted = next((specs[t].dtype for t in node.inputs if specs[t].dtype in FLOAT_DTYPES), specs[node.inputs[0]].dtype)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Ref):
            continue
        if not isinstance(leaf, bool | int | float | np.ndarray | np.generic):
            return None
        if ParamRole.CONSTANT in roles and ParamRole.CONSTANT not in found.values():
            found[index] = ParamRole.CONSTANT
        else:
            array = np.asarray(leaf)
            kept = array.dtype == bool or wanted not in ("float32", "float64", "int32", "int64")
            found[index] = Constant(array if kept else array.astype(wanted))
    return Call(operands=found)


def _remaining(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    """With the divisor's sign, as Python has it; ONNX's Mod has it for whole numbers alone."""
    made = _operands(node, specs, roles)
    return None if made is None else Call(operands=made.operands, type="FloorMod")


def _power(exponent: float) -> Maker:
    return lambda node, specs, roles: Call(operands={1: Constant(exponent)})


def _transposed(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    order = attributes.permutation(node, specs[node.inputs[0]])
    return None if order is None else Call({"perm": order})


def _reduced(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    if setting(node, "initial") is not None or len(node.inputs) > 1:
        return None
    shape, _ = _of(node, specs)
    if node.type.startswith("Global"):
        axis = attributes.data_axis(node, len(shape))
        axes = [i for i in range(1, len(shape)) if i != axis]
    else:
        axes = _axes(node, len(shape), setting(node, "axis", 1))
    if node.type == "Norm" and (
        setting(node, "ord") not in (None, 2, "fro") or (setting(node, "ord") and len(axes) > 1)
    ):
        return None
    return Call({"keepdims": int(bool(setting(node, "keepdims", 2, False)))}, {1: Constant(axes)})


def _summed_up(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    axis = setting(node, "axis", 1)
    return None if axis is None else Call(operands={1: Constant(np.array(axis, np.int64))})


def _layer_norm(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    layer: Any = node.operation
    rank = len(specs[node.inputs[0]].shape)
    axes = sorted(_axes(node, rank, layer.axis))
    if getattr(layer, "rms_scaling", False) or axes != list(range(axes[0], rank)):
        return None
    return Call({"axis": axes[0], "epsilon": float(layer.epsilon)})


def _group_norm(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    layer: Any = node.operation
    shape, _ = _of(node, specs)
    channels = shape[layer.axis % len(shape)]
    groups = channels if layer.groups == -1 else layer.groups
    return None if groups is None else Call({"num_groups": int(groups), "epsilon": float(layer.epsilon)})


def _unit_norm(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    axes = _axes(node, len(specs[node.inputs[0]].shape), setting(node, "axis"))
    return Call({"axis": axes[0], "p": 2}) if len(axes) == 1 else None


def _shrunk(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    edge = float(setting(node, "threshold", 1, 0.5))
    name = getattr(getattr(node.operation, "activation", None), "__name__", node.type).lower()
    return Call({"lambd": edge, "bias": edge if name.startswith("soft") else 0.0})


def _thresholded(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    edge = setting(node, "threshold", 1)
    return None if edge is None or setting(node, "default_value", 2, 0) else Call({"alpha": float(edge)})


def _gelu(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    default = node.type == "Gelu"  # of the operation; the activation function is exact
    return Call({"approximate": "tanh" if setting(node, "approximate", 1, default) else "none"})


def _pooled(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    layer: Any = node.operation
    if node.layer is None or not hasattr(layer, "pool_size"):
        return None
    kernel, strides = tuple(layer.pool_size), tuple(layer.strides)
    sizes = attributes.spatial(node, specs[node.inputs[0]])
    pads = attributes.window_pads(layer.padding, sizes, kernel, strides, (1,) * len(kernel))
    if pads is None:  # they follow from sizes that are free
        return Call({"kernel_shape": kernel, "strides": strides, "auto_pad": "SAME_UPPER"})
    if node.type.startswith("Average"):
        return None
    flat = (*(begin for begin, _ in pads), *(end for _, end in pads))
    return Call({"kernel_shape": kernel, "strides": strides, "pads": flat})


def _adapted(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    axes = list(range(1, len(specs[node.inputs[0]].shape)))
    axes.remove(attributes.data_axis(node, len(axes) + 1))
    kind = "AdaptiveAveragePool" if "Average" in node.type else "AdaptiveMaxPool"
    given = np.broadcast_to(setting(node, "output_size"), len(axes))
    return Call({"axes": tuple(axes), "sizes": tuple(int(n) for n in given)}, type=kind)


def _convolved(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    """By a filter that is an activation or a constant."""
    x, kernel = setting(node, "inputs", 0), setting(node, "kernel", 1)
    if not isinstance(x, Ref) or not isinstance(kernel, Ref | np.ndarray):
        return None
    source, shape = specs[x.id].shape, kernel.shape if isinstance(kernel, np.ndarray) else specs[kernel.id].shape
    n = len(shape) - 2
    if None in shape or len(source) != n + 2:
        return None
    axis = attributes.data_axis(node, n + 2)
    sizes = tuple(source[i] for i in range(1, n + 2) if i != axis)
    strides, dilations = (
        tuple(int(i) for i in np.broadcast_to(setting(node, name, None, 1), n)) for name in ("strides", "dilation_rate")
    )
    pads = attributes.window_pads(
        setting(node, "padding"), sizes, tuple(int(k or 0) for k in shape[:n]), strides, dilations
    )
    if pads is None and set(dilations) != {1}:
        return None
    channels, held, order = source[axis], dict[int, Constant | ParamRole](), (n + 1, n, *range(n))
    groups = None if channels is None else channels // int(shape[n] or 1)
    if node.type == "DepthwiseConv":
        if isinstance(kernel, Ref):
            return None
        kernel = kernel.reshape(*shape[:n], 1, -1)
        groups = int(shape[n] or 0)
    if isinstance(kernel, np.ndarray):
        held[1], order = Constant(kernel.transpose(order).copy()), tuple(range(n + 2))
    window: dict[str, AttributeValue] = {"auto_pad": "SAME_UPPER"}
    if pads is not None:
        window = {"pads": (*(begin for begin, _ in pads), *(end for _, end in pads))}
    if groups is None:
        return None
    given: dict[str, AttributeValue] = {
        "strides": strides,
        "dilations": dilations,
        "group": groups,
        "channel_axis": axis,
        "kernel_order": order,
    }
    return Call({**window, **given}, held, "ConvOfTensors")


def _truths(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    made = _reduced(node, specs, roles)
    return None if made is None else Call(made.attributes, made.operands, f"Reduce{node.type}")


def _one_hot(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    count, dtype = int(setting(node, "num_classes", 1)), specs[node.outputs[0]].dtype
    held: Operands = {1: Constant(np.array(count, np.int64)), 2: Constant(np.array([0, 1], dtype))}
    return Call({"axis": int(setting(node, "axis", None, -1))}, held, "OneHot")


def _discretized(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    layer: Any = node.operation
    if layer.output_mode != "int" or layer.bin_boundaries is None:
        return None
    return Call(operands={1: Constant(np.asarray(layer.bin_boundaries, np.float32))}, type="Bucketize")


def _spread(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    _, shape = _of(node, specs)
    return Call(operands={1: Constant([1 if n is None else n for n in shape])})


def _tiled(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    shape, _ = _of(node, specs)
    repeats = np.atleast_1d(setting(node, "repeats", 1)).tolist()
    whole = [*[1] * (len(shape) - len(repeats)), *repeats]
    return Call(operands={1: Constant(whole)}) if len(whole) == len(shape) else None


def _repeated(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    """Each row several times, as a lookup of rows."""
    axis, repeats = setting(node, "axis", 2), setting(node, "repeats", 1)
    shape, _ = _of(node, specs)
    count = None if axis is None else shape[axis]
    if count is None or not isinstance(repeats, int):
        return None
    return Call({"axis": int(axis) % len(shape)}, {1: Constant(np.arange(count).repeat(repeats))}, "Gather")


def _sliced(starts: Any, ends: Any, axes: Any, steps: Any = None, **attributes: AttributeValue) -> Call:
    operands: Operands = {i: Constant([int(n) for n in v]) for i, v in enumerate((starts, ends, axes, steps), 1) if v}
    return Call(attributes, operands)


def _cropped(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    shape, _ = _of(node, specs)
    axis = attributes.data_axis(node, len(shape))
    axes = [i for i in range(1, len(shape)) if i != axis]
    layer: Any = node.operation
    if node.type == "CenterCrop":
        sizes, wanted = [shape[i] for i in axes], (layer.height, layer.width)
        if len(shape) != 4 or any(n is None or n < w for n, w in zip(sizes, wanted, strict=True)):
            return None
        starts = [((n or 0) - w) // 2 for n, w in zip(sizes, wanted, strict=True)]
        return _sliced(starts, [s + w for s, w in zip(starts, wanted, strict=True)], axes)
    pairs = [layer.cropping] if len(axes) == 1 else layer.cropping
    ends = [-e if e else np.iinfo(np.int64).max for _, e in pairs]
    return _sliced([begin for begin, _ in pairs], ends, axes)


def _item(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    key = setting(node, "key", 1)
    shape, _ = _of(node, specs)
    parts = list(key) if isinstance(key, tuple | list) else [key]
    if any(not isinstance(p, slice | int | np.integer | type(...)) or isinstance(p, bool) for p in parts):
        return None
    if ... in parts:
        at = parts.index(...)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    last, found, gone = np.iinfo(np.int64).max, [], []
    for axis, part in enumerate(parts):
        if not isinstance(part, slice):
            gone.append(axis)
            found.append((int(part), int(part) + 1 or last, axis, 1))
        elif part != slice(None):
            step = 1 if part.step is None else part.step
            if any(not isinstance(v, int | np.integer | None) for v in (part.start, part.stop, step)):
                return None
            first, end = (0, last) if step > 0 else (last, np.iinfo(np.int64).min)
            start = first if part.start is None else part.start
            found.append((start, end if part.stop is None else part.stop, axis, step))
    if not found:
        return _sliced([0], [last], [0])
    return _sliced(*zip(*found, strict=True), **({"squeeze": tuple(gone)} if gone else {}))


def _part(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    starts, sizes = setting(node, "start_indices", 1), setting(node, "shape")
    if any(not isinstance(n, int | np.integer) for n in (*starts, *sizes)):
        return None
    return _sliced(starts, [s + n for s, n in zip(starts, sizes, strict=True)], range(len(starts)))


def _flipped(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    axes = _axes(node, len(specs[node.inputs[0]].shape), setting(node, "axis", 1))
    count = len(axes)
    return _sliced([-1] * count, [np.iinfo(np.int64).min] * count, axes, [-1] * count)


def _taken(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    axis = setting(node, "axis", 2)
    if axis is None:
        return None
    indices = setting(node, "indices", 1)
    if isinstance(node.args[0], np.ndarray) and isinstance(indices, Ref):
        return Call({"axis": int(axis)}, {0: Constant(node.args[0])}, "Gather")
    if not isinstance(node.args[0], Ref):
        return None
    if isinstance(indices, Ref):
        return Call({"axis": int(axis)})
    return Call({"axis": int(axis)}, {1: Constant(np.asarray(indices, np.int64))})


def _padded(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    shape, _ = _of(node, specs)
    rank, mode, value = len(shape), "constant", 0.0
    if node.layer is not None:
        axis = attributes.data_axis(node, rank)
        given = node.operation.padding
        widths = iter([given] if rank == 3 else given)
        pairs = [(0, 0) if i in (0, axis) else tuple(next(widths)) for i in range(rank)]
    else:
        mode = setting(node, "mode", None, "constant")
        value = setting(node, "constant_values", 1, 0) or 0
        pairs = np.broadcast_to(np.asarray(setting(node, "pad_width")), (rank, 2)).tolist()
    if mode not in ("constant", "reflect", "edge", "symmetric") or mode == "symmetric" or np.ndim(value):
        return None
    flat = [*(int(b) for b, _ in pairs), *(int(e) for _, e in pairs)]
    filled: Operands = {2: Constant(float(value))} if value else {}
    return Call({"mode": mode}, {1: Constant(flat), **filled})


def _resized(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    shape, _ = _of(node, specs)
    axis = attributes.data_axis(node, len(shape))
    axes = tuple(i for i in range(1, len(shape)) if i != axis)
    size = setting(node, "size")
    mode = {"nearest": "nearest", "bilinear": "linear"}.get(setting(node, "interpolation", None, "nearest"))
    cuts = ("antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio")
    if mode is None or any(setting(node, name) for name in cuts):
        return None
    factor = node.type.startswith("UpSampling")
    if factor and mode == "nearest":
        how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    else:
        # floor((i + 0.5)·scale) is the half-pixel coordinate rounded with its ties up.
        how = {"coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil"}
    if node.type == "Resizing":
        size = (node.operation.height, node.operation.width)
    numbers = list(size) if isinstance(size, list | tuple) else [size] * len(axes)
    if len(numbers) != len(axes):
        return None
    held = Constant([float(n) for n in numbers]) if factor else Constant([int(n) for n in numbers])
    return Call({"mode": mode, **how, "axes": axes, "channel_axis": axis}, {2 if factor else 3: held})


def _blocks(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    size = int(setting(node, "block_size", 1))
    last = setting(node, "data_format", None, "channels_last") != "channels_first"
    return Call(
        {
            "blocksize": size,
            "channel_axis": 3 if last else 1,
            **({"mode": "DCR"} if node.type == "DepthToSpace" else {}),
        }
    )


def _stacked(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    return Call({"new_axis": 1}) if all(isinstance(x, Ref) for x in keras.tree.flatten(node.args[0])) else None


def _joined(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    parts = keras.tree.flatten(node.args[0])
    operands: Operands = {}
    for index, part in enumerate(parts):
        if isinstance(part, Ref):
            continue
        if ParamRole.CONSTANT in roles and not operands:
            operands[index] = ParamRole.CONSTANT
        elif isinstance(part, np.ndarray):
            operands[index] = Constant(part)
        else:
            return None
    return Call(operands=operands)


def _einsum(node: Node, specs: Specs, roles: frozenset[ParamRole]) -> Call | None:
    made = _operands(node, specs, roles)
    equation = str(setting(node, "subscripts")).replace(" ", "")
    return None if made is None or "->" not in equation else Call({"equation": equation}, made.operands)


_BY_CLASS: Mapping[str, Maker] = {
    "Square": _power(2.0),
    "Rsqrt": _power(-0.5),
    "Stack": _stacked,
    "Unstack": lambda node, specs, roles: Call({"squeeze": 1}),
    **dict.fromkeys(("Cropping1D", "Cropping2D", "Cropping3D", "CenterCrop"), _cropped),
    "GetItem": _item,
    "Slice": _part,
    "Flip": _flipped,
    "Take": _taken,
    "Tile": _tiled,
    "Repeat": _repeated,
    **{f"Adaptive{kind}Pooling{rank}D": _adapted for kind in ("Average", "Max") for rank in (1, 2, 3)},
    **dict.fromkeys(("AveragePooling1D", "AveragePooling2D", "AveragePooling3D"), _pooled),
    **dict.fromkeys(("Conv", "DepthwiseConv"), _convolved),
    **dict.fromkeys(("Any", "All"), _truths),
    "OneHot": _one_hot,
    "Discretization": _discretized,
    **dict.fromkeys(("Mod", "Remainder"), _remaining),
    **dict.fromkeys(("Roll", "TakeAlongAxis", "RepeatVector", "Embedding"),
                    lambda node, specs, roles: None),
}  # fmt: skip
"""By class of the layer or operation, before the type is looked at."""
_BY_TYPE: Mapping[str, Maker] = {
    "Transpose": _transposed,
    **dict.fromkeys(
        ("ReduceSum", "ReduceProd", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMin", "GlobalMaxPool"), _reduced
    ),
    "CumSum": _summed_up,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "LpNormalization": _unit_norm,
    "Elu": _said("alpha", "alpha", 1, 1.0),
    "Celu": _said("alpha", "alpha", 1, 1.0),
    "Shrink": _shrunk,
    "ThresholdedRelu": _thresholded,
    "Gelu": _gelu,
    "MaxPool": _pooled,
    "Expand": _spread,
    "Pad": _padded,
    "Resize": _resized,
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _blocks),
    "Concat": _joined,
    "Einsum": _einsum,
    **dict.fromkeys(
        ("Add", "Mul", "Sub", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Where", "MatMul"), _operands
    ),
}  # fmt: skip
"""By the canonical type."""
