"""The kits' small reference models as Keras users would hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import ActivationAttrs, AxisAttrs, BatchNormAttrs, ConvAttrs, Op, OpKind, ParamRole, PoolAttrs
from bitwright.testing.channels_last import (
    image_shape,
    images,
    is_depthwise,
    kernel,
    padding,
    sizes,
    transposed_padding,
    value,
)
from bitwright.testing.ports import ModelPort
from bitwright.testing.reference import ReferenceModel

Array = NDArray[Any]


def keras_model(model: ReferenceModel) -> Any:
    """A reference model as a functional model with a layer for each op."""
    import keras

    values = {model.graph.inputs[0]: keras.Input(image_shape(model), name=model.graph.inputs[0])}
    weights: list[tuple[Any, list[Array]]] = []
    for op in model.graph.ops:
        layer = _keras_layer(model, op)
        given = [values[t] for t in op.data_inputs]
        values[op.output] = layer(given if len(given) > 1 else given[0])
        roles = (ParamRole.GAMMA, ParamRole.BETA, ParamRole.MEAN, ParamRole.VAR, ParamRole.BIAS)
        found = [v for role in roles if (v := value(model, op, role)) is not None]
        weights.append((layer, [kernel(model, op), *found] if ParamRole.WEIGHT in op.params else found))
    outputs = [values[t] for t in model.graph.outputs]
    made = keras.Model(values[model.graph.inputs[0]], outputs[0] if len(outputs) == 1 else outputs)
    for layer, arrays in weights:
        layer.set_weights(arrays)
    return made


def _keras_layer(model: ReferenceModel, op: Op) -> Any:
    from keras import layers

    bias = {"use_bias": ParamRole.BIAS in op.params, "name": op.id}
    named = {"name": op.id}
    match op.kind, op.attrs:
        case OpKind.CONV, ConvAttrs() as a:
            weight = np.asarray(model.params[op.params[ParamRole.WEIGHT]])
            common = {"strides": a.strides, "padding": padding(a, sizes(model, op)), "dilation_rate": a.dilations}
            if is_depthwise(op, weight):
                return layers.DepthwiseConv2D(a.kernel, depth_multiplier=len(weight) // a.groups, **common, **bias)
            return layers.Conv2D(len(weight), a.kernel, groups=a.groups, **common, **bias)
        case OpKind.CONV_TRANSPOSE, ConvAttrs() as a:
            width = model.params[op.params[ParamRole.WEIGHT]].shape[1]
            return layers.Conv2DTranspose(width, a.kernel, a.strides, padding=transposed_padding(a), **bias)
        case OpKind.LINEAR, _:
            return layers.Dense(len(model.params[op.params[ParamRole.WEIGHT]]), **bias)
        case OpKind.BATCH_NORM, BatchNormAttrs(epsilon=epsilon):
            return layers.BatchNormalization(epsilon=epsilon, **named)
        case OpKind.RELU, _:
            return layers.ReLU(**named)
        case OpKind.CLIPPED_RELU, ActivationAttrs(minimum=0.0, maximum=high):
            return layers.ReLU(high, **named)
        case OpKind.MAX_POOL, PoolAttrs(window=ConvAttrs() as w):
            return layers.MaxPooling2D(w.kernel, w.strides, padding(w, sizes(model, op)), **named)
        case OpKind.SOFTMAX, AxisAttrs(axis=-1):
            return layers.Softmax(**named)
        case OpKind.CONCAT, AxisAttrs(axis=1):
            return layers.Concatenate(**named)
    match op.type, op.attrs:
        case "LeakyRelu", ActivationAttrs(alpha=alpha):
            return layers.LeakyReLU(alpha, **named)
        case "GlobalAveragePool", _:
            return layers.GlobalAveragePooling2D(keepdims=True, **named)
        case "Flatten", _:
            return layers.Flatten(**named)
        case "Sigmoid", _:
            return layers.Activation("sigmoid", **named)
        case "Add" | "Mul", _ if len(op.data_inputs) == 2:
            return (layers.Add if op.type == "Add" else layers.Multiply)(**named)
    raise NotImplementedError(f"{op.type} isn't brought to Keras yet: add it in bitwright_keras/testing.py")


def model_port() -> ModelPort:
    """See `bitwright.testing.ports`."""
    return ModelPort(keras_model, images)
