"""Composite layers and operations, spelled out: each expansion makes the calls of the normal form, or returns None to
leave the call as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from bitwright_keras.capture.attention import grouped_query_attention, multi_head_attention
from bitwright_keras.capture.einsum import einsum_dense
from bitwright_keras.capture.emitter import Emitter
from bitwright_keras.graph.model import variables_of
from bitwright_keras.graph.native import copy_layer

Expansion = Callable[[Emitter, Any, str, tuple[Any, ...], dict[str, Any]], Any]


def activation(made: Emitter, function: Any, owner: keras.layers.Layer, name: str, x: Any) -> Any:
    """The activation that a layer was given as an argument, as a call of its own: "conv/relu"."""
    if function is None or function is keras.activations.linear:
        return x
    called = getattr(function, "__name__", None) or type(function).__name__.lower()
    full = f"{name}/{called.strip('_<>')}"
    if isinstance(function, keras.layers.Layer):
        layer, params = made.layer(function, full)
        return made.emit(full, layer, x, params=params)
    layer, _ = made.layer(
        owner,
        full,
        "activation",
        lambda file_name: keras.layers.Activation(function, name=file_name, dtype=owner.dtype_policy),
    )
    return made.emit(full, layer, x, params={})


def _weighted(
    made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:  # fmt: skip
    """A convolution or dense layer, and its activation after it."""
    function = layer.activation
    if function is None or function is keras.activations.linear:
        return None
    plain, params = made.layer(layer, name, make=lambda file: copy_layer(layer, name=file, activation=None))
    return activation(made, function, layer, name, made.emit(name, plain, *args, params=params, **kwargs))


def _separable(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A depthwise convolution, then one with 1×1 kernels (which has the layer's name and bias)."""
    rank = layer.rank
    depthwise_type = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)[rank - 1]
    pointwise_type = (keras.layers.Conv1D, keras.layers.Conv2D)[rank - 1]
    shared = {"data_format": layer.data_format, "dtype": layer.dtype_policy, "trainable": layer.trainable}

    settings = {
        "kernel_size": layer.kernel_size, "strides": layer.strides, "padding": layer.padding,
        "dilation_rate": layer.dilation_rate, "depth_multiplier": layer.depth_multiplier, "use_bias": False,
        "depthwise_regularizer": layer.depthwise_regularizer, "depthwise_constraint": layer.depthwise_constraint,
        **shared,
    }  # fmt: skip
    first, params = made.layer(
        layer, f"{name}/depthwise", "depthwise", lambda file_name: depthwise_type(**settings, name=file_name),
        params={"kernel": f"{name}/depthwise_kernel"},
    )  # fmt: skip
    fresh = not first.built
    x = made.emit(f"{name}/depthwise", first, *args, params=params)
    second, params = made.layer(
        layer,
        name,
        "pointwise",
        lambda file_name: pointwise_type(
            layer.filters, 1, use_bias=layer.use_bias, kernel_regularizer=layer.pointwise_regularizer,
            kernel_constraint=layer.pointwise_constraint, bias_regularizer=layer.bias_regularizer,
            bias_constraint=layer.bias_constraint, name=file_name, **shared,
        ),
        params={"kernel": f"{name}/pointwise_kernel", **({"bias": f"{name}/bias"} if layer.use_bias else {})},
    )  # fmt: skip
    x = made.emit(name, second, x, params=params)
    if fresh:
        first.kernel.assign(layer.depthwise_kernel)
        second.kernel.assign(layer.pointwise_kernel)
        if layer.use_bias:
            second.bias.assign(layer.bias)
    return activation(made, layer.activation, layer, name, x)


def _einsum_dense(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = einsum_dense(made, layer, name, args[0] if args else kwargs["inputs"])
    if x is not None:
        x = activation(made, layer.activation, layer, name, x)
        if not layer.supports_masking:
            x._keras_mask = None  # the dense layer in its place would hand the mask on
        return x
    return _weighted(made, layer, name, args, kwargs)


def _rescaling(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product and a sum with constants."""
    scale, offset = (np.asarray(v, np.float32) for v in (layer.scale, layer.offset))
    channels_first = getattr(layer, "data_format", "channels_last") == "channels_first"
    if channels_first and (scale.ndim or offset.ndim):
        return None
    trivial = not offset.any() and (scale == 1).all()
    x = _cast(made, layer, name if trivial else f"{name}/cast", args[0])
    if trivial and x is not args[0]:  # the cast is all there is
        return x
    if not offset.any():
        return made.emit(name, keras.ops.multiply, x, _number(scale))
    if (scale != 1).any():
        x = made.emit(f"{name}/scale", keras.ops.multiply, x, _number(scale))
    return made.emit(name, keras.ops.add, x, _number(offset))


def _normalization(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(x − mean) / max(√variance, ε), with constants."""
    if layer.invert or getattr(layer, "mean", None) is None:
        return None
    mean = np.asarray(keras.ops.convert_to_numpy(layer.mean), np.float32)
    deviation = np.sqrt(np.asarray(keras.ops.convert_to_numpy(layer.variance), np.float32))
    deviation = np.maximum(deviation, np.float32(keras.backend.epsilon()))
    x = made.emit(
        f"{name}/mean", keras.ops.subtract, _cast(made, layer, f"{name}/cast", args[0]), _number(_squeezed(mean))
    )
    return made.emit(name, keras.ops.divide, x, _number(_squeezed(deviation)))


def _cast(made: Emitter, layer: keras.layers.Layer, name: str, x: Any) -> Any:
    wanted = layer.compute_dtype
    if keras.backend.standardize_dtype(x.dtype) == wanted:
        return x
    return made.emit(name, keras.ops.cast, x, wanted)


def _number(value: np.ndarray) -> Any:
    return float(value) if value.ndim == 0 else value


def _squeezed(value: np.ndarray) -> np.ndarray:
    """Without leading axes of length 1, which broadcasting gives back."""
    while value.ndim > 1 and value.shape[0] == 1:
        value = value[0]
    return value.reshape(()) if value.size == 1 else value


def _time_distributed(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of a dense layer: that layer, which works on the last axis anyway."""
    inner = layer.layer
    if not isinstance(inner, keras.layers.Dense) or kwargs.get("mask") is not None:
        return None
    params = {key: f"{name}/{key}" for key in variables_of(inner)}

    def dense(file_name: str) -> Any:
        twin = copy_layer(inner, name=file_name, activation=None)
        twin.input_spec = None
        return twin

    plain, params = made.layer(layer, name, make=dense, params=params)  # type: ignore[assignment]
    return activation(made, inner.activation, inner, name, made.emit(name, plain, *args, params=params))


def _spectral(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer inside, whose kernel holds what training has normalized; it has the wrapper's name."""
    inner = layer.layer
    known = type(inner).__module__.partition(".")[0] == "keras" and getattr(inner, "quantization_mode", None) is None
    if not known or keras.backend.standardize_dtype(args[0].dtype) != inner.compute_dtype:  # it casts its result back
        return None
    expansion = EXPANSIONS.get(type(inner).__name__)
    found = None if expansion is None else expansion(made, inner, name, args, kwargs)
    if found is not None:
        return found
    plain, params = made.layer(inner, name)
    return made.emit(name, plain, *args, params=params, **kwargs)


def _embedding(made: Emitter, layer: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """With its mask as a comparison that is made where something reads it."""
    if not layer.mask_zero:
        return None
    plain, params = made.layer(layer, name, make=lambda file: copy_layer(layer, name=file, mask_zero=False))
    result = made.emit(name, plain, *args, params=params)
    result._keras_mask = keras.ops.not_equal(args[0], 0)
    return result


def _matmul(made: Emitter, operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product with a constant matrix: a dense layer without bias."""
    x1, x2 = (*args, *kwargs.values())[:2]
    if not isinstance(x1, keras.KerasTensor) or not isinstance(x2, np.ndarray) or x2.ndim != 2:
        return None
    if len(x1.shape) < 2 or x1.shape[-1] is None or keras.backend.standardize_dtype(x1.dtype) != str(x2.dtype):
        return None
    layer, params = made.layer(
        operation,
        name,
        make=lambda file: keras.layers.Dense(x2.shape[1], use_bias=False, name=file, dtype=str(x2.dtype)),
        params={"kernel": f"{name}/kernel"},
    )
    result = made.emit(name, layer, x1, params=params)
    layer.kernel.assign(x2)
    return result


EXPANSIONS: Mapping[str, Expansion] = {
    **dict.fromkeys(
        ("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", "DepthwiseConv1D",
         "DepthwiseConv2D", "Dense"),
        _weighted,
    ),
    "SeparableConv1D": _separable,
    "SeparableConv2D": _separable,
    "Embedding": _embedding,
    "EinsumDense": _einsum_dense,
    "MultiHeadAttention": multi_head_attention,
    **dict.fromkeys(("GroupQueryAttention", "GroupedQueryAttention"), grouped_query_attention),
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    "TimeDistributed": _time_distributed,
    "SpectralNormalization": _spectral,
    "Matmul": _matmul,
}  # fmt: skip
"""By class of Keras's own layers and operations."""
