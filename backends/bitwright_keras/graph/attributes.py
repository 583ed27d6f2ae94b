"""Arguments of layers and operations → the canonical attributes of an op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bitwright.graph import (
    ActivationAttrs,
    AxisAttrs,
    BatchNormAttrs,
    ConvAttrs,
    OpKind,
    PoolAttrs,
    ProductAttrs,
    clipping,
    same_pads,
)
from bitwright_keras.graph.model import Node, Spec

Shape = tuple[int | None, ...]


def setting(node: Node, name: str, position: int | None = None, default: Any = None) -> Any:
    """An argument, wherever the operation keeps it: as an attribute, by keyword or by position of the call."""
    if hasattr(node.operation, name):
        return getattr(node.operation, name)
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if position is not None and position < len(node.args) else default


def data_axis(node: Node, rank: int) -> int:
    """Channel axis of a layer with a data format."""
    return 1 if getattr(node.operation, "data_format", "channels_last") == "channels_first" else rank - 1


def spatial(node: Node, spec: Spec) -> Shape:
    """The spatial part of a shape."""
    axis = data_axis(node, len(spec.shape))
    return spec.shape[2:] if axis == 1 else spec.shape[1:-1]


def window_pads(
    mode: str, sizes: Shape, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[tuple[int, int], ...] | None:
    """Explicit padding of a window; None where "same" depends on a size that isn't fixed. "causal" pads before."""
    if mode == "valid":
        return ((0, 0),) * len(kernel)
    if mode == "causal":
        return tuple((d * (k - 1), 0) for k, d in zip(kernel, dilations, strict=True))
    return same_pads(sizes, kernel, strides, dilations)


def convolution(node: Node, source: Spec, kernel: tuple[int, ...], channels: int) -> ConvAttrs | None:
    """Geometry of a convolution; None where a size that it depends on isn't fixed."""
    layer: Any = node.operation
    count = len(kernel)
    strides, dilations = (
        tuple(given) * (count if len(given) == 1 else 1) for given in (layer.strides, layer.dilation_rate)
    )
    groups = channels if hasattr(layer, "depth_multiplier") else getattr(layer, "groups", 1)
    pads = window_pads(layer.padding, spatial(node, source), kernel, strides, dilations)
    return None if pads is None else ConvAttrs(kernel, strides, dilations, pads, groups)


def transposed(node: Node, source: Spec, result: Spec, kernel: tuple[int, ...]) -> ConvAttrs:
    """Geometry of a transposed convolution.

    It is the gradient of a convolution from O to n elements: whole = (n − 1)·s + d·(k − 1) + 1 elements, of which
    O stay; "same" crops ⌊max(whole − O, 0)/2⌋ at the beginning (tf.nn.conv_transpose). O − n·s doesn't depend on n.
    """
    layer: Any = node.operation
    pads, extra = [], []
    for i, (k, s, d) in enumerate(zip(kernel, layer.strides, layer.dilation_rate, strict=True)):
        n, size = spatial(node, source)[i], spatial(node, result)[i]
        if n is None or size is None:
            n = 64
            size = _transposed_size(layer, i, n, k, s, d)
        whole = (n - 1) * s + d * (k - 1) + 1
        begin = max(whole - size, 0) // 2 if layer.padding == "same" else 0
        end = whole - size - begin
        pads.append((begin, max(end, 0)))
        extra.append(max(-end, 0))
    extras = tuple(extra)
    return ConvAttrs(
        kernel, tuple(layer.strides), tuple(layer.dilation_rate), tuple(pads), 1, extras if any(extras) else ()
    )


def _transposed_size(layer: Any, axis: int, n: int, k: int, s: int, d: int) -> int:
    """Output size of a transposed convolution (keras.layers.Conv2DTranspose)."""
    reach, extra = d * (k - 1) + 1, layer.output_padding
    if extra is None:
        return n * s if layer.padding == "same" else n * s + max(reach - s, 0)
    add = extra if isinstance(extra, int) else extra[axis]
    pad = reach // 2 if layer.padding == "same" else 0
    return (n - 1) * s + reach - 2 * pad + add


def batch_norm(node: Node, rank: int) -> BatchNormAttrs:
    """Epsilon in float32, as exported artefacts hold it, so that folding gives the same bits on both sides."""
    layer: Any = node.operation
    axis = layer.axis[0] if isinstance(layer.axis, list | tuple) else layer.axis
    return BatchNormAttrs(float(np.float32(layer.epsilon)), int(axis) % rank)


def pool(node: Node, source: Spec) -> tuple[str, PoolAttrs]:
    """ONNX type and attributes of an averaging call."""
    rank = len(source.shape)
    if node.type == "Mean":
        axes = setting(node, "axis", 1)
        chosen = range(rank) if axes is None else axes if isinstance(axes, list | tuple) else [axes]
        kept = bool(setting(node, "keepdims", 2))
        return "ReduceMean", PoolAttrs(tuple(int(a) % rank for a in chosen), keepdims=kept)
    layer: Any = node.operation
    if node.type.startswith("Global"):
        axis = data_axis(node, rank)
        keep = bool(layer.keepdims)
        axes = tuple(i for i in range(1, rank) if i != axis)
        return "GlobalAveragePool" if keep else "ReduceMean", PoolAttrs(axes, keepdims=keep)
    if node.type.startswith("Adaptive"):
        return "AveragePool", PoolAttrs()
    kernel, strides = tuple(layer.pool_size), tuple(layer.strides)
    ones = (1,) * len(kernel)
    pads = window_pads(layer.padding, spatial(node, source), kernel, strides, ones)
    return "AveragePool", PoolAttrs(window=None if pads is None else ConvAttrs(kernel, strides, ones, pads))


def bounds(low: Any, high: Any) -> tuple[OpKind, str, ActivationAttrs]:
    """See `bitwright.graph.clipping`; a computed bound makes an activation."""
    if not all(
        v is None or (isinstance(v, int | float | np.number | np.ndarray) and not np.ndim(v)) for v in (low, high)
    ):
        return OpKind.ACTIVATION, "Clip", ActivationAttrs()
    return clipping(low, high)


def rectifier(layer: Any) -> tuple[OpKind, str, ActivationAttrs | None]:
    """A `ReLU` layer by its three settings."""
    if layer.threshold:
        return OpKind.ACTIVATION, "ThresholdedRelu", None
    if layer.negative_slope:
        if layer.max_value is not None:
            return OpKind.OPAQUE, "ReLU", None
        return OpKind.PRELU, "LeakyRelu", ActivationAttrs(alpha=float(layer.negative_slope))
    if layer.max_value is None:
        return OpKind.RELU, "Relu", None
    return OpKind.CLIPPED_RELU, "Clip", ActivationAttrs(0.0, float(layer.max_value))


def axis(node: Node, kind: OpKind, source: Spec, result: Spec) -> AxisAttrs | None:
    """The axis of a concat, split, softmax or layer norm, counted from the front."""
    default = -1 if kind in (OpKind.SOFTMAX, OpKind.LAYER_NORM) else 0
    number = setting(node, "axis", 1, default)
    if isinstance(number, list | tuple):
        if len(number) != 1 and kind is not OpKind.LAYER_NORM:
            return None
        rank = len(source.shape)
        number = min(int(a) % rank for a in number)
    if not isinstance(number, int):
        return None
    rank = len(result.shape) if node.type == "Stack" else len(source.shape)
    return AxisAttrs(number % rank)


def permutation(node: Node, source: Spec) -> tuple[int, ...] | None:
    """Input axis of each output axis of a transposing call; None where it can't be told."""
    rank = len(source.shape)
    order = list(range(rank))
    if node.type == "Permute":
        return (0, *(int(i) for i in node.operation.dims))
    if node.type == "Transpose":
        axes = setting(node, "axes", 1)
        return tuple(reversed(order)) if axes is None else tuple(int(i) % rank for i in axes)
    if node.type == "Swapaxes":
        a, b = setting(node, "axis1", 1), setting(node, "axis2", 2)
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
        return tuple(order)
    if node.type == "Moveaxis":
        moved, to = (np.atleast_1d(setting(node, n, i)) for i, n in enumerate(("source", "destination"), 1))
        rest = iter(i for i in order if i not in {int(m) % rank for m in moved})
        placed = {int(t) % rank: int(m) % rank for m, t in zip(moved, to, strict=True)}
        return tuple(placed[i] if i in placed else next(rest) for i in order)
    return None


def product(layer: Any, ranks: Sequence[int]) -> ProductAttrs | None:
    """What a `Dot` layer (or, without a layer, `keras.ops.dot`) contracts, where it isn't a plain matrix product."""
    if layer is None:
        return None if ranks[1] <= 2 else ProductAttrs(None)
    if list(ranks) != [3, 3] or layer.normalize:
        return ProductAttrs(None)
    axes = [layer.axes] * 2 if isinstance(layer.axes, int) else list(layer.axes)
    first, second = (axis % 3 for axis in axes)
    if 0 in (first, second):
        return ProductAttrs(None)
    return ProductAttrs((first == 1, second == 2)) if (first, second) != (2, 1) else None
