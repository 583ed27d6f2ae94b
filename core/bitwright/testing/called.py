"""What an op computes by its `Call`: ONNX's attributes and literal operands, for types whose attributes say too little.

Axes count in the tensor's own layout. Formulas: the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import AxisAttrs, Constant, ConvAttrs, Graph, Op, OpKind, ParamRole, PoolAttrs, operands
from bitwright.testing.kernels import ELEMENTWISE, compute

Array = NDArray[Any]
Values = list[Array | None]
"""Of the operands, in ONNX's order; None: absent."""

_REDUCTIONS: Mapping[str, Callable[..., Any]] = {
    "ReduceMean": np.mean, "ReduceSum": np.sum, "ReduceMax": np.max, "ReduceMin": np.min, "ReduceProd": np.prod,
}  # fmt: skip


def called(graph: Graph, op: Op, inputs: Sequence[Array], params: Mapping[ParamRole, Array]) -> list[Array] | None:
    """An op's outputs by its call; None where it has none, or one that isn't computed here.

    Args:
        graph: of the op.
        op: of the graph.
        inputs: present data inputs, in order.
        params: by role, canonical layout.

    Raises:
        AssertionError: the call contradicts the inputs.
    """
    if op.call is None or op.type not in _CALLS:
        return None
    given = dict(zip(op.data_inputs, inputs, strict=True))
    values: Values = []
    for operand in operands(op):
        if isinstance(operand, Constant):
            values.append(operand.array)
        elif isinstance(operand, ParamRole):
            values.append(params.get(operand))
        else:
            values.append(None if operand is None else given[operand])
    try:
        return _CALLS[op.type](graph, op, op.call.attributes, values)
    except (ValueError, IndexError, TypeError) as error:
        raise AssertionError(f"{op.id} ({op.type}) can't be computed by its call {op.call}: {error}") from error


def _ints(value: object) -> tuple[int, ...]:
    return tuple(int(i) for i in np.asarray(value).reshape(-1))


def _at(values: Values, index: int) -> Array | None:
    return values[index] if index < len(values) else None


def _transpose(graph: Graph, op: Op, attributes: Mapping[str, Any], values: Values) -> list[Array] | None:
    x = values[0]
    return None if x is None or "perm" not in attributes else [np.transpose(x, _ints(attributes["perm"]))]


def _pool(graph: Graph, op: Op, attributes: Mapping[str, Any], values: Values) -> list[Array] | None:
    x = values[0]
    if x is None or "kernel_shape" not in attributes or attributes.get("ceil_mode") or "auto_pad" in attributes:
        return None
    kernel = _ints(attributes["kernel_shape"])
    ones, rank = (1,) * len(kernel), len(kernel)
    pads = _ints(attributes.get("pads", (0,) * (2 * rank)))
    window = ConvAttrs(
        kernel,
        _ints(attributes.get("strides", ones)),
        _ints(attributes.get("dilations", ones)),
        tuple(zip(pads[:rank], pads[rank:], strict=True)),
    )
    counted = bool(attributes.get("count_include_pad", 0))
    return compute(replace(op, attrs=PoolAttrs(window=window, count_include_pad=counted)), graph, (x,), {}, ())


def _norm(graph: Graph, op: Op, attributes: Mapping[str, Any], values: Values) -> list[Array] | None:
    x = values[0]
    axis = op.attrs.axis if isinstance(op.attrs, AxisAttrs) else attributes.get("axis")
    if x is None or axis is None or "epsilon" not in attributes:
        return None
    axes = tuple(range(int(axis) % x.ndim, x.ndim))
    wide = x.astype(np.float64)
    if op.type == "LayerNormalization":
        wide = wide - wide.mean(axis=axes, keepdims=True)
    y = wide / np.sqrt(np.square(wide).mean(axis=axes, keepdims=True) + float(attributes["epsilon"]))
    scale, shift = _at(values, 1), _at(values, 2)
    y = y if scale is None else y * scale
    return [np.asarray(y if shift is None else y + shift, x.dtype)]


def _slice(graph: Graph, op: Op, attributes: Mapping[str, Any], values: Values) -> list[Array] | None:
    x, starts, ends, axes, steps = (_at(values, place) for place in range(5))
    if x is None or starts is None or ends is None:
        return None
    chosen = range(starts.size) if axes is None else _ints(axes)
    strides = (1,) * starts.size if steps is None else _ints(steps)
    index: list[Any] = [slice(None)] * x.ndim
    for axis, start, end, step in zip(chosen, _ints(starts), _ints(ends), strides, strict=True):
        length = x.shape[axis]
        stop = None if step < 0 and end < -length else end
        index[axis] = slice(start, stop, step)
    return [x[tuple(index)]]


def _gather(graph: Graph, op: Op, attributes: Mapping[str, Any], values: Values) -> list[Array] | None:
    data, indices = values[0], _at(values, 1)
    if data is None or indices is None or indices.dtype.kind not in "iu":
        return None
    return [np.take(data, indices, axis=int(attributes.get("axis", 0)))]


def _pad(graph: Graph, op: Op, attributes: Mapping[str, Any], values: Values) -> list[Array] | None:
    x, pads, value, axes = (_at(values, i) for i in range(4))
    if x is None or pads is None or attributes.get("mode", "constant") != "constant":
        return None
    flat, chosen = _ints(pads), tuple(range(x.ndim)) if axes is None else _ints(axes)
    if any(n < 0 for n in flat):
        return None
    widths = [(0, 0)] * x.ndim
    for i, axis in enumerate(chosen):
        widths[axis] = flat[i], flat[i + len(chosen)]
    return [np.pad(x, widths, constant_values=0 if value is None else np.asarray(value).reshape(-1)[0])]


def _spread(graph: Graph, op: Op, attributes: Mapping[str, Any], values: Values) -> list[Array] | None:
    x, by = values[0], _at(values, 1)
    if x is None or by is None:
        return None
    if op.type == "Tile":
        return [np.tile(x, _ints(by))]
    return [np.asarray(np.broadcast_to(x, np.broadcast_shapes(x.shape, _ints(by))))]


def _reduce(graph: Graph, op: Op, attributes: Mapping[str, Any], values: Values) -> list[Array] | None:
    x, axes = values[0], _at(values, 1)
    attrs = op.attrs if isinstance(op.attrs, PoolAttrs) else None
    over = _ints(axes) if axes is not None else attrs.axes if attrs is not None else ()
    if x is None or not over:
        return None
    keep = bool(attributes.get("keepdims", 1)) if attrs is None else attrs.keepdims
    return [np.asarray(_REDUCTIONS[op.type](x, axis=over, keepdims=keep), x.dtype)]


def _elementwise(graph: Graph, op: Op, attributes: Mapping[str, Any], values: Values) -> list[Array] | None:
    a, b = values[0], _at(values, 1)
    if a is None or b is None or len(values) != 2 or op.kind is OpKind.OPAQUE:
        return None
    return [np.asarray(np.power(a, b) if op.type == "Pow" else ELEMENTWISE[op.type](a, b))]


Called = Callable[[Graph, Op, Mapping[str, Any], Values], list[Array] | None]
_CALLS: Mapping[str, Called] = {
    "Transpose": _transpose,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Tile": _spread,
    "Expand": _spread,
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("Sub", "Div", "Max", "Min", "Pow"), _elementwise),
}
