"""What each op computes, in plain numpy: readable rather than fast, and exact enough to judge other backends by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright.graph import (
    ACTIVATION_TYPES,
    ActivationAttrs,
    AxisAttrs,
    BatchNormAttrs,
    ConvAttrs,
    Graph,
    Op,
    OpKind,
    ParamRole,
    PoolAttrs,
    ProductAttrs,
    columns,
    erf,
    output_channels,
    output_spatial,
    to_matrix,
)

Array = NDArray[Any]
Params = Mapping[ParamRole, Array]

ELEMENTWISE: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Sum": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
}


def _unary(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: np.asarray(function(x), x.dtype)


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "Exp": np.exp, "Abs": np.abs, "Neg": np.negative, "Sqrt": np.sqrt, "Log": np.log, "Erf": erf,
    "Reciprocal": np.reciprocal, "Floor": np.floor, "Ceil": np.ceil, "Round": np.rint, "Sign": np.sign,
    "Sin": np.sin, "Cos": np.cos,
}  # fmt: skip
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **{name: activation.compute for name, activation in ACTIVATION_TYPES.items()},
    **{name: _unary(function) for name, function in _FUNCTIONS.items()},
}
"""By type: all of `ACTIVATION_TYPES`, and a few more."""


def compute(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params, perm: tuple[int, ...]) -> list[Array]:
    """Outputs of one op.

    Args:
        op, graph: the op and where it lies (layouts and shapes of its tensors).
        inputs: its present inputs, in order.
        params: its parameters by role, canonical layout.
        perm: permutation of a transpose.

    Raises:
        ModelError: the op's type is none of those that this module knows.
    """
    if op.kind is OpKind.SPLIT and isinstance(op.attrs, AxisAttrs):
        return list(np.split(inputs[0], len(op.outputs), op.attrs.axis))
    if op.kind in ELEMENTWISE_KINDS and op.type in ELEMENTWISE:
        operands = [*inputs, *(params[r] for r in (ParamRole.CONSTANT,) if r in params)]
        return [np.asarray(functools.reduce(ELEMENTWISE[op.type], operands))]
    if op.type == "Gelu" and op.call is not None and op.call.attributes.get("approximate") == "tanh":
        return [_gelu_by_tanh(inputs[0])]
    if op.type in ACTIVATIONS and op.kind not in KERNELS:
        return [ACTIVATIONS[op.type](inputs[0])]
    if op.kind is OpKind.ACTIVATION and op.type == "Clip":
        return [_clip(op, graph, inputs, params)]
    kernel = KERNELS.get(op.kind)
    if kernel is None:
        raise ModelError(f"the reference backend has no kernel for {op.id!r} ({op.type})")
    if op.kind is OpKind.TRANSPOSE:
        return [np.transpose(inputs[0], perm)]
    return [kernel(op, graph, inputs, params)]


def _gelu_by_tanh(x: Array) -> Array:
    """Hendrycks and Gimpel 2016, §2."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), x.dtype)


def supports(op: Op) -> bool:
    """Whether `compute` knows the op."""
    return op.kind in KERNELS or op.kind is OpKind.SPLIT or op.type in ACTIVATIONS or op.type in ELEMENTWISE


def _channel_axis(graph: Graph, tensor: str, default: int) -> int:
    axis = graph.tensors[tensor].channel_axis
    return default if axis is None else axis


def _bias(y: Array, params: Params) -> Array:
    return y + params[ParamRole.BIAS][:, None] if ParamRole.BIAS in params else y


def _linear(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    x, weight = inputs[0], params[ParamRole.WEIGHT]
    rows = np.concatenate([to_matrix(op, weight)[0] @ c[0] for c in columns(op, x)], axis=1)
    return np.ascontiguousarray(_bias(rows, params).T.reshape(*x.shape[:-1], -1))


def _conv(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    x, weight = inputs[0], params[ParamRole.WEIGHT]
    axis = _channel_axis(graph, op.data_inputs[0], 1)
    matrix = to_matrix(op, weight)
    y = np.concatenate([np.matmul(matrix, c) for c in columns(op, x, axis)], axis=2)
    out = output_channels(op, weight.shape)
    spatial = conv_spatial(op, np.moveaxis(x, axis, 1).shape[2:])
    y = _bias(y.reshape(out, -1), params).reshape(out, len(x), *spatial)
    return np.ascontiguousarray(np.moveaxis(y, 0, _channel_axis(graph, op.output, 1)))


def conv_spatial(op: Op, spatial: tuple[int, ...]) -> tuple[int, ...]:
    """Spatial shape of a (transposed) convolution's output."""
    attrs = op.attrs
    if not isinstance(attrs, ConvAttrs):
        raise ModelError(f"{op.id!r} ({op.type}) has no convolution geometry")
    if op.kind is OpKind.CONV:
        return output_spatial(spatial, attrs)
    extra = attrs.output_padding or (0,) * len(attrs.kernel)
    return tuple(
        (n - 1) * s + d * (k - 1) + 1 - sum(p) + e
        for n, s, d, k, p, e in zip(
            spatial, attrs.strides, attrs.dilations, attrs.kernel, attrs.pads, extra, strict=True
        )
    )


def _matmul(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    operands = [*inputs, *(params[r] for r in (ParamRole.CONSTANT,) if r in params)]
    a, b = operands[0], operands[1]
    if isinstance(op.attrs, ProductAttrs):
        if op.attrs.transposed is None:
            raise ModelError(f"{op.id!r} contracts axes that its attributes don't name")
        first, second = op.attrs.transposed
        a, b = np.swapaxes(a, -1, -2) if first else a, np.swapaxes(b, -1, -2) if second else b
    return np.asarray(np.matmul(a, b))


def _embedding(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    return np.asarray(params[ParamRole.WEIGHT][inputs[0]])


def _batch_norm(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    x, attrs = inputs[0], op.attrs
    if not isinstance(attrs, BatchNormAttrs):
        raise ModelError(f"batch norm {op.id!r} has no BatchNormAttrs")
    shape = [-1 if i == attrs.axis % x.ndim else 1 for i in range(x.ndim)]
    mean, var = (params[r].reshape(shape) for r in (ParamRole.MEAN, ParamRole.VAR))
    y = (x - mean) / np.sqrt(var + np.float32(attrs.epsilon))
    if ParamRole.GAMMA in params:
        y = y * params[ParamRole.GAMMA].reshape(shape)
    return np.asarray(y + params[ParamRole.BETA].reshape(shape) if ParamRole.BETA in params else y)


def _layer_norm(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    x, gamma = inputs[0], params[ParamRole.GAMMA]
    axes = tuple(range(x.ndim - gamma.ndim, x.ndim))
    centred = x - x.mean(axis=axes, keepdims=True, dtype=np.float64)
    deviation = np.sqrt(np.square(centred).mean(axis=axes, keepdims=True) + 1e-5)
    return np.asarray(centred / deviation * gamma + params.get(ParamRole.BETA, np.float32(0)), x.dtype)


def _relu(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    return np.maximum(inputs[0], np.float32(0))


def _clip(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    attrs = op.attrs if isinstance(op.attrs, ActivationAttrs) else ActivationAttrs(0.0, 6.0)
    low, high = (b if n is None else n for n, b in ((attrs.minimum, -np.inf), (attrs.maximum, np.inf)))
    return np.asarray(np.clip(inputs[0], low, high), inputs[0].dtype)


def _prelu(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    x = inputs[0]
    if ParamRole.SLOPE in params:
        slope = params[ParamRole.SLOPE]
        if slope.ndim == 1 and slope.size > 1:
            told = op.call.attributes.get("channel_axis") if op.call is not None else None
            axis = (told if isinstance(told, int) else _channel_axis(graph, op.data_inputs[0], 1)) % x.ndim
            slope = slope.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    else:
        alpha = op.attrs.alpha if isinstance(op.attrs, ActivationAttrs) else None
        slope = np.array(0.01 if alpha is None else alpha, np.float32)
    return np.where(x < 0, x * slope, x)


def _softmax(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    axis = op.attrs.axis if isinstance(op.attrs, AxisAttrs) else -1
    shifted = inputs[0] - inputs[0].max(axis=axis, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(total) if op.type == "LogSoftmax" else e / total)


def _concat(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    return np.concatenate(inputs, op.attrs.axis if isinstance(op.attrs, AxisAttrs) else 1)


def _reshape(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    shape = graph.tensors[op.output].shape
    if shape is None or sum(n is None for n in shape) > 1:
        raise ModelError(f"reshape {op.id!r} needs a target shape with at most one free dimension, got {shape}")
    return inputs[0].reshape([-1 if n is None else n for n in shape])


def _windows(x: Array, window: ConvAttrs, fill: float) -> Array:
    """(samples, channels, *spatial) → (samples, channels, *output, kernel elements)."""
    padded = np.pad(x, [(0, 0), (0, 0), *window.pads], constant_values=fill)
    dims = len(window.kernel)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilations, strict=True))
    views = sliding_window_view(padded, reach, tuple(range(2, 2 + dims)))
    steps = tuple(slice(None, None, s) for s in window.strides)
    taps = tuple(slice(None, None, d) for d in window.dilations)
    views = views[(slice(None), slice(None), *steps, *taps)]
    return views.reshape(*views.shape[: 2 + dims], -1)


def _pool(op: Op, graph: Graph, inputs: tuple[Array, ...], params: Params) -> Array:
    attrs, largest = op.attrs, op.kind is OpKind.MAX_POOL
    if not isinstance(attrs, PoolAttrs):
        raise ModelError(f"pooling {op.id!r} has no PoolAttrs")
    if attrs.window is None:
        reduce = np.max if largest else np.mean
        return np.asarray(reduce(inputs[0], axis=attrs.axes, keepdims=attrs.keepdims), np.float32)
    axis = _channel_axis(graph, op.data_inputs[0], 1)
    x = np.moveaxis(inputs[0], axis, 1)
    if largest:
        y = _windows(x, attrs.window, -np.inf).max(axis=-1)
    else:
        total = _windows(x, attrs.window, 0).sum(axis=-1, dtype=np.float32)
        inside = _windows(np.ones((1, 1, *x.shape[2:]), np.float32), attrs.window, float(attrs.count_include_pad))
        y = total / inside.sum(axis=-1)
    return np.ascontiguousarray(np.moveaxis(y, 1, axis))


Kernel = Callable[[Op, Graph, tuple[Array, ...], Params], Array]

ELEMENTWISE_KINDS = frozenset({OpKind.ADD, OpKind.MUL, OpKind.ELEMENTWISE})

KERNELS: dict[OpKind, Kernel] = {
    OpKind.CONV: _conv,
    OpKind.CONV_TRANSPOSE: _conv,
    OpKind.LINEAR: _linear,
    OpKind.MATMUL: _matmul,
    OpKind.EMBEDDING: _embedding,
    OpKind.BATCH_NORM: _batch_norm,
    OpKind.LAYER_NORM: _layer_norm,
    OpKind.RELU: _relu,
    OpKind.CLIPPED_RELU: _clip,
    OpKind.PRELU: _prelu,
    OpKind.SOFTMAX: _softmax,
    OpKind.CONCAT: _concat,
    OpKind.RESHAPE: _reshape,
    OpKind.TRANSPOSE: _reshape,
    OpKind.AVERAGE_POOL: _pool,
    OpKind.MAX_POOL: _pool,
}
