"""ONNX attributes and constant operands → the canonical attributes of an op."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright.graph import (
    ActivationAttrs,
    AxisAttrs,
    BatchNormAttrs,
    ConvAttrs,
    OpKind,
    PoolAttrs,
    clipping,
    same_pads,
)
from bitwright_onnx.graph.optable import constant_shape, flag
from bitwright_onnx.graph.tensors import tensor_array

Pads = tuple[tuple[int, int], ...]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a constant operand; None where it is computed or absent."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return tensor_array(value.const_value)


def static_dims(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Shape with None for free dimensions; None for an unknown rank. Dimensions ≤ 0 count as free."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) and d > 0 else None for d in value.shape)


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in node.attributes.get_ints(name, default) or default)


def convolution(node: ir.Node) -> ConvAttrs | None:
    """Geometry of a Conv or ConvTranspose; None where automatic padding depends on a dimension that isn't fixed."""
    weight = node.inputs[1]
    assert weight is not None
    kernel = constant_shape(weight)[2:]
    ones = (1,) * len(kernel)
    strides, dilations = _ints(node, "strides", ones), _ints(node, "dilations", ones)
    groups = node.attributes.get_int("group", 1)
    extra: tuple[int, ...] = ()
    pads: Pads | None
    if node.op_type == "ConvTranspose":
        extra = _ints(node, "output_padding", (0,) * len(kernel))
        pads, extra = _transposed_pads(node, kernel, strides, dilations, extra)
    else:
        pads = window_pads(node, kernel, strides, dilations)
    if pads is None:
        return None
    return ConvAttrs(kernel, strides, dilations, pads, groups, extra if any(extra) else ())


def window_pads(
    node: ir.Node, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> Pads | None:
    """Explicit padding of a convolution or pooling window.

    The odd element of SAME_UPPER is at the end, of SAME_LOWER at the beginning (ONNX operator specification, Conv).
    """
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    rank = len(kernel)
    if mode in ("NOTSET", ""):
        return _explicit_pads(node, rank)
    if mode == "VALID":
        return ((0, 0),) * rank
    dims = static_dims(node.inputs[0])
    pads = same_pads([None if dims is None else dims[2 + i] for i in range(rank)], kernel, strides, dilations)
    return pads if pads is None or mode == "SAME_UPPER" else tuple((end, begin) for begin, end in pads)


def _explicit_pads(node: ir.Node, rank: int) -> Pads:
    flat = _ints(node, "pads", (0,) * (2 * rank))
    if len(flat) != 2 * rank:
        raise ModelError(
            f"node {node.name!r} ({node.op_type}) has {len(flat)} pads for {rank} axes; two an axis are needed"
        )
    return tuple(zip(flat[:rank], flat[rank:], strict=True))


def _halves(total: int, mode: str) -> tuple[int, int]:
    small, big = total // 2, total - total // 2
    return (small, big) if mode == "SAME_UPPER" else (big, small)


def _transposed_pads(
    node: ir.Node,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    extra: tuple[int, ...],
) -> tuple[Pads | None, tuple[int, ...]]:
    """Padding and output padding of a ConvTranspose.

    total = s·(n − 1) + output_padding + d·(k − 1) + 1 − output size (ONNX operator specification, ConvTranspose). An
    output that is asked to be larger than the window reaches gets more output padding.
    """
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    wanted = _ints(node, "output_shape", ())[-len(kernel) :]
    rank = len(kernel)
    if not wanted and mode in ("NOTSET", ""):
        return _explicit_pads(node, rank), extra
    if not wanted and mode == "VALID":
        return ((0, 0),) * rank, extra
    dims = static_dims(node.inputs[0])
    pads, padded = [], list(extra)
    for i, (k, s, d, e) in enumerate(zip(kernel, strides, dilations, extra, strict=True)):
        n = dims[2 + i] if dims is not None else None
        if wanted and n is None:
            return None, extra
        # With SAME the output has n·s elements, and n drops out of the total.
        total = e + d * (k - 1) + 1 - s if not wanted else s * ((n or 0) - 1) + e + d * (k - 1) + 1 - wanted[i]
        padded[i] += max(-total, 0)
        pads.append(_halves(max(total, 0), "SAME_UPPER" if mode == "SAME_UPPER" else "SAME_LOWER"))
    return tuple(pads), tuple(padded)


def clip(node: ir.Node) -> tuple[OpKind, ActivationAttrs]:
    """See `bitwright.graph.clipping`; a computed bound makes an activation. Its type stays ONNX's."""
    bounds: list[float | None] = []
    for index in (1, 2):
        value = node.inputs[index] if len(node.inputs) > index else None
        array = constant(value)
        if value is not None and (array is None or array.size != 1):
            return OpKind.ACTIVATION, ActivationAttrs()
        bounds.append(None if array is None else float(array.reshape(-1)[0]))
    kind, _, attrs = clipping(*bounds)
    return kind, attrs


def batch_norm(node: ir.Node) -> BatchNormAttrs | None:
    """None for a batch norm in training mode."""
    if flag(node, "training_mode") or len([o for o in node.outputs if o.name]) > 1:
        return None
    return BatchNormAttrs(node.attributes.get_float("epsilon", 1e-5))


def pool(node: ir.Node) -> PoolAttrs | None:
    """Averaging; None where the averaged axes are computed by the model."""
    dims = static_dims(node.inputs[0])
    if node.op_type == "GlobalAveragePool":
        return PoolAttrs(axes=tuple(range(2, len(dims))) if dims is not None else ())
    if node.op_type == "ReduceMean":
        keep = bool(node.attributes.get_int("keepdims", 1))
        operand = node.inputs[1] if len(node.inputs) > 1 else None
        array = constant(operand)
        if operand is not None and array is None:
            return None
        axes = _ints(node, "axes", ()) if array is None else tuple(int(a) for a in array.reshape(-1))
        if not axes and flag(node, "noop_with_empty_axes"):
            return None
        if dims is not None:
            axes = tuple(a % len(dims) for a in axes) or tuple(range(len(dims)))
        return PoolAttrs(axes=axes, keepdims=keep)
    kernel = _ints(node, "kernel_shape", ())
    ones = (1,) * len(kernel)
    strides, dilations = _ints(node, "strides", ones), _ints(node, "dilations", ones)
    pads = window_pads(node, kernel, strides, dilations)
    inside = flag(node, "count_include_pad")
    if pads is None or flag(node, "ceil_mode"):
        return PoolAttrs(count_include_pad=inside)
    return PoolAttrs(window=ConvAttrs(kernel, strides, dilations, pads), count_include_pad=inside)


def axis(node: ir.Node, default: int) -> AxisAttrs:
    """The `axis` attribute, counted from the front where the rank is known."""
    number = node.attributes.get_int("axis", default)
    dims = static_dims(node.inputs[0])
    return AxisAttrs(number % len(dims) if dims else number)
