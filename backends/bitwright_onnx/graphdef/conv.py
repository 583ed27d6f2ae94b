"""Convolutions, pooling, batch normalization and resizing of GraphDef, which ONNX has with channels first.

SAME padding: TensorFlow pads more at the end, as ONNX's SAME_UPPER (tensorflow.org, tf.nn "Notes on padding").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright_onnx.graphdef.builder import Builder, Linear
from bitwright_onnx.graphdef.nodes import FLOAT, Node


def channels_last(node: Node) -> bool:
    """Whether channels lie on the last axis (NHWC, NDHWC)."""
    return not node.text("data_format", "NHWC").startswith("NC")


def to_first(g: Builder, node: Node, value: ir.Value, rank: int) -> ir.Value:
    """A value with its channels on axis 1."""
    return g.transpose(value, (0, rank - 1, *range(1, rank - 1)), node.name) if channels_last(node) else value


def to_native(g: Builder, node: Node, value: ir.Value, rank: int) -> ir.Value:
    """The other way round, as an own node: its output has the TensorFlow tensor's name."""
    if not channels_last(node):
        return value
    return g.add("Transpose", value, hint=node.name, perm=[0, *range(2, rank), 1])


def spatial(node: Node, values: Sequence[int], rank: int) -> list[int]:
    """The spatial entries of a list of one number an axis; 1 where it is empty."""
    if not values:
        return [1] * (rank - 2)
    return list(values[1:-1] if channels_last(node) else values[2:])


def padding(node: Node, rank: int) -> dict[str, Any]:
    """ONNX attributes of a convolution's or pool's padding."""
    kind = node.text("padding")
    if kind == "SAME":
        return {"auto_pad": "SAME_UPPER"}
    if kind == "VALID":
        return {"pads": [0] * 2 * (rank - 2)}
    pairs = np.reshape(node.integers("explicit_paddings"), (-1, 2))
    inner = pairs[1:-1] if channels_last(node) else pairs[2:]
    return {"pads": [*map(int, inner[:, 0]), *map(int, inner[:, 1])]}


def same_padding(
    kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], sizes: Sequence[int | None]
) -> dict[str, Any]:
    """SAME in numbers wherever it has the same for every size, so that the geometry is a fixed one.

    ONNX Runtime's SAME_UPPER knows no dilation, so that a dilated convolution with strides needs known sizes.
    """
    begins, ends = [], []
    for k, s, d, n in zip(kernel, strides, dilations, sizes, strict=True):
        reach = (k - 1) * d + 1
        if s != 1 and n is None:
            return {"auto_pad": "SAME_UPPER"}
        total = reach - 1 if s == 1 or n is None else max((-(-n // s) - 1) * s + reach - n, 0)
        begins.append(total // 2)
        ends.append(total - total // 2)
    return {"pads": [*begins, *ends]}


def weight(g: Builder, node: Node, order: tuple[int, ...], depthwise: bool = False) -> tuple[ir.Value, tuple[int, ...]]:
    """A filter in ONNX's layout, as an initializer where it is constant; and its shape there (0: unknown)."""
    tensor = node.inputs[1]
    array = g.known(tensor)
    if array is not None:
        turned = array.transpose(order)
        if depthwise:
            turned = turned.reshape(-1, 1, *turned.shape[2:])
        return g.form(tensor, turned, f"filter{order}{depthwise}"), turned.shape
    value = g.transpose(g.value(tensor), order, node.name)
    shape = [s or 0 for s in g.shape(tensor) or (0,) * len(order)]
    turned_shape = tuple(shape[i] for i in order)
    if depthwise:
        kernel = [turned_shape[2], turned_shape[3]]
        if 0 in kernel:
            raise ModelError(f"{node.op} {node.name!r}: its filter is computed and has no known shape")
        value = g.add("Reshape", value, g.numbers(f"{node.name}/shape", [-1, 1, *kernel]), hint=node.name)
        turned_shape = (turned_shape[0] * turned_shape[1], 1, *kernel)
    return value, turned_shape


def convolution(g: Builder, node: Node) -> None:
    """Conv2D and Conv3D; grouped where the filter takes fewer channels than the input has."""
    rank = 5 if node.op == "Conv3D" else 4
    order = (rank - 1, rank - 2, *range(rank - 2))
    w, shape = weight(g, node, order)
    source = g.shape(node.inputs[0])
    channels = None if source is None else source[-1 if channels_last(node) else 1]
    groups = channels // shape[1] if channels and shape[1] else 1
    _finish(g, node, w, shape, rank, groups)


def depthwise(g: Builder, node: Node) -> None:
    """DepthwiseConv2dNative: filter (h, w, in, multiplier)."""
    w, shape = weight(g, node, (2, 3, 0, 1), depthwise=True)
    source = g.shape(node.inputs[1])
    groups = source[2] if source is not None else None
    if not groups:
        raise ModelError(f"{node.op} {node.name!r}: the number of its channels isn't known")
    _finish(g, node, w, shape, 4, groups)


def _finish(g: Builder, node: Node, w: ir.Value, shape: tuple[int, ...], rank: int, groups: int) -> None:
    kernel = list(shape[2:])
    dilations, strides = (spatial(node, node.integers(key), rank) for key in ("dilations", "strides"))
    pads = padding(node, rank)
    if "auto_pad" in pads and all(kernel):
        pads = same_padding(kernel, strides, dilations, _sizes(g, node, node.inputs[0], rank))
    if node.name in g.dilated:
        rates, amounts = g.dilated[node.name]
        pads = {"pads": [*(a for a, _ in amounts), *(b for _, b in amounts)]}
        dilations = list(rates)
    x = to_first(g, node, g.value(node.inputs[0]), rank)
    if all(kernel):
        pads["kernel_shape"] = kernel
    y = g.add("Conv", x, w, hint=node.name, strides=strides, dilations=dilations, group=groups, **pads)
    _linear(g, node, y, rank, shape[0])


def _linear(g: Builder, node: Node, y: ir.Value, rank: int, channels: int) -> None:
    producer = y.producer()
    assert producer is not None
    result = to_native(g, node, y, rank)
    g.set(node.output(), result)
    if channels_last(node):
        g.linear[node.output()] = Linear(producer, result, channels, (channels,))


def transposed(g: Builder, node: Node) -> None:
    """Conv2DBackpropInput and Conv3DBackpropInputV2: inputs are the output's shape, the filter, the data."""
    rank = 5 if node.op.startswith("Conv3D") else 4
    data = node.inputs[2]
    order = (rank - 1, rank - 2, *range(rank - 2))  # (*kernel, out, in) → (in, out, *kernel)
    w, shape = weight(g, node, order)
    kernel, strides = shape[2:], spatial(node, node.integers("strides"), rank)
    dilations = spatial(node, node.integers("dilations"), rank)
    size = _sizes(g, node, node.output(), rank)
    wanted = g.known(node.inputs[0])
    if wanted is not None:
        size = list(spatial(node, [int(i) for i in wanted], rank))
    pads, extra = _backward_padding(node, kernel, strides, dilations, _sizes(g, node, data, rank), size)
    y = g.add(
        "ConvTranspose", to_first(g, node, g.value(data), rank), w, hint=node.name, kernel_shape=list(kernel),
        strides=strides, dilations=dilations, pads=pads, output_padding=extra,
    )  # fmt: skip
    _linear(g, node, y, rank, shape[1])


def _sizes(g: Builder, node: Node, tensor: str, rank: int) -> list[int | None]:
    shape = g.shape(tensor)
    if shape is None:
        return [None] * (rank - 2)
    return list(shape[1:-1] if channels_last(node) else shape[2:])


def _backward_padding(
    node: Node,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    inputs: Sequence[int | None],
    outputs: Sequence[int | None],
) -> tuple[list[int], list[int]]:
    """Paddings and output padding with which the forward convolution maps `outputs` to `inputs`.

    Where sizes are free, the output is taken for input · stride (SAME), or the smallest one (VALID).
    """
    begins, ends, extras = [], [], []
    explicit = padding(node, len(kernel) + 2).get("pads")
    for axis, (k, s, d, n, m) in enumerate(zip(kernel, strides, dilations, inputs, outputs, strict=True)):
        reach = (k - 1) * d + 1
        if explicit is not None:
            begin, end = explicit[axis], explicit[axis + len(kernel)]
            extra = 0 if n is None or m is None else m - ((n - 1) * s + reach - begin - end)
        else:
            total = reach - s if n is None or m is None else (n - 1) * s + reach - m
            begin, end, extra = max(total, 0) // 2, max(total, 0) - max(total, 0) // 2, max(-total, 0)
        begins.append(begin)
        ends.append(end)
        extras.append(extra)
    return [*begins, *ends], extras


def pool(g: Builder, node: Node) -> None:
    """Max and average pooling; the average leaves padding out."""
    rank = 5 if node.op.endswith("3D") else 4
    kind = "MaxPool" if node.op.startswith("Max") else "AveragePool"
    windows = [spatial(node, node.integers(key), rank) for key in ("ksize", "strides")]
    pads = padding(node, rank)
    if "auto_pad" in pads:
        pads = same_padding(windows[0], windows[1], [1] * (rank - 2), _sizes(g, node, node.inputs[0], rank))
    x = to_first(g, node, g.value(node.inputs[0]), rank)
    y = g.add(kind, x, hint=node.name, kernel_shape=windows[0], strides=windows[1], **pads)
    g.set(node.output(), to_native(g, node, y, rank))


def batch_norm(g: Builder, node: Node) -> None:
    """FusedBatchNorm, V2 and V3, in inference."""
    if node.flag("is_training", True):
        raise ModelError(
            f"{node.op} {node.name!r} normalizes with the batch's own statistics; export the graph for inference"
        )
    params = [g.value(i) for i in node.inputs[1:5]]
    x = to_first(g, node, g.value(node.inputs[0]), 4)
    y = g.add("BatchNormalization", x, *params, hint=node.name, epsilon=node.number("epsilon", 1e-4))
    g.set(node.output(), to_native(g, node, y, 4))


def resize(g: Builder, node: Node) -> None:
    """ResizeBilinear and ResizeNearestNeighbor on (batch, height, width, channels)."""
    linear = node.op == "ResizeBilinear"
    mode = "asymmetric"
    if node.flag("align_corners"):
        mode = "align_corners"
    elif node.flag("half_pixel_centers"):
        mode = "half_pixel"
    attributes: dict[str, Any] = {"mode": "linear" if linear else "nearest", "coordinate_transformation_mode": mode}
    if not linear:
        # floor((i + 0.5)·scale) is the half-pixel coordinate rounded with its ties up.
        attributes["nearest_mode"] = "floor" if mode == "asymmetric" else "round_prefer_ceil"
    source = g.value(node.inputs[0])
    if linear and node.dtype("T") != FLOAT:  # ResizeBilinear gives float32, ONNX's Resize what it is given
        source = g.add("Cast", source, hint=node.name, to=int(ir.DataType.FLOAT))
    x = to_first(g, node, source, 4)
    sizes = _sizes(g, node, node.inputs[0], 4)
    wanted = g.known(node.inputs[1])
    scales = _scales(sizes, wanted)
    if scales is not None:
        given = g.numbers(f"{node.name}/scales", [1, 1, *scales], np.float32)
        y = g.add("Resize", x, None, given, hint=node.name, **attributes)
    else:
        head = g.shape_of(x, node.name, 0, 2)
        size = g.add("Concat", head, g.value(node.inputs[1]), hint=node.name, axis=0)
        y = g.add("Resize", x, None, None, size, hint=node.name, **attributes)
    g.set(node.output(), g.add("Transpose", y, hint=node.name, perm=[0, 2, 3, 1]))


def _scales(sizes: Sequence[int | None], wanted: NDArray[Any] | None) -> list[float] | None:
    """Whole factors, which need no shapes at run time."""
    if wanted is None or any(s is None or int(w) % s for s, w in zip(sizes, wanted, strict=True)):
        return None
    return [int(w) // s for s, w in zip(sizes, wanted, strict=True) if s is not None]


def depth_to_space(g: Builder, node: Node) -> None:
    """DepthToSpace and SpaceToDepth."""
    x = to_first(g, node, g.value(node.inputs[0]), 4)
    block = node.integer("block_size")
    if node.op == "DepthToSpace":
        y = g.add("DepthToSpace", x, hint=node.name, blocksize=block, mode="DCR")
    else:
        y = g.add("SpaceToDepth", x, hint=node.name, blocksize=block)
    g.set(node.output(), to_native(g, node, y, 4))
