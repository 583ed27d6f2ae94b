"""Reference models as Keras and TensorFlow users would hold them: samples, height, width, channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import ActivationAttrs, AxisAttrs, BatchNormAttrs, ConvAttrs, Op, OpKind, ParamRole, PoolAttrs
from bitwright.testing.reference import ReferenceModel

Array = NDArray[Any]


def images(batch: Mapping[str, Array]) -> dict[str, Array]:
    """A reference model's batch, images channels last."""
    return {k: np.ascontiguousarray(np.moveaxis(v, 1, -1)) for k, v in batch.items()}


def padding(window: ConvAttrs, sizes: tuple[int, ...]) -> str:
    """ "valid" or "same", for inputs of these sizes."""
    if not any(any(p) for p in window.pads):
        return "valid"
    same = []
    for n, k, s, d in zip(sizes, window.kernel, window.strides, window.dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        same.append((total // 2, total - total // 2))
    if tuple(same) != window.pads:
        raise NotImplementedError(f"padding by {window.pads} is neither 'valid' nor 'same'")
    return "same"


def transposed_padding(window: ConvAttrs) -> str:
    """The same of a transposed convolution."""
    cut = [(k - s) // 2 for k, s in zip(window.kernel, window.strides, strict=True)]
    if window.groups == 1 and not any(window.output_padding):
        if not any(any(p) for p in window.pads):
            return "valid"
        if all(p == (c, c) for p, c in zip(window.pads, cut, strict=True)):
            return "same"
    raise NotImplementedError("grouped transposed convolutions and output padding: Keras and TensorFlow have none")


def is_depthwise(op: Op, weight: Array) -> bool:
    """One input channel a group."""
    return isinstance(op.attrs, ConvAttrs) and op.attrs.groups > 1 and weight.shape[1] == 1


def kernel(model: ReferenceModel, op: Op) -> Array:
    """A linear op's weight in the frameworks' layout."""
    weight = np.asarray(model.params[op.params[ParamRole.WEIGHT]], np.float32)
    if op.kind is OpKind.LINEAR:
        before = model.graph.producer(op.data_inputs[0])
        if before is not None and before.type == "Flatten":  # its features come in the order of the axes
            shape = model.graph.tensors[before.data_inputs[0]].shape or ()
            weight = np.moveaxis(weight.reshape(-1, *(n or 1 for n in shape[1:])), 1, -1).reshape(weight.shape)
        return np.ascontiguousarray(weight.T)
    if is_depthwise(op, weight):
        assert isinstance(op.attrs, ConvAttrs)
        groups = op.attrs.groups
        return np.ascontiguousarray(weight.reshape(groups, -1, *weight.shape[2:]).transpose(2, 3, 0, 1))
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))


def value(model: ReferenceModel, op: Op, role: ParamRole) -> Array | None:
    """A vector of an op."""
    return np.asarray(model.params[op.params[role]], np.float32) if role in op.params else None


def _sizes(model: ReferenceModel, op: Op) -> tuple[int, ...]:
    return tuple(n or 1 for n in (model.graph.tensors[op.data_inputs[0]].shape or ())[2:])


def _shape(model: ReferenceModel) -> tuple[int, ...]:
    channels, *sizes = (n or 1 for n in (model.graph.tensors[model.graph.inputs[0]].shape or ())[1:])
    return (*sizes, channels)


def _missing(op: Op) -> NotImplementedError:
    return NotImplementedError(f"{op.type} isn't brought to Keras and TensorFlow yet: add it in channels_last.py")


# -- Keras


def keras_model(model: ReferenceModel) -> Any:
    """As a functional model with a layer for each op."""
    import keras

    values = {model.graph.inputs[0]: keras.Input(_shape(model), name=model.graph.inputs[0])}
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
            common = {"strides": a.strides, "padding": padding(a, _sizes(model, op)), "dilation_rate": a.dilations}
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
            return layers.MaxPooling2D(w.kernel, w.strides, padding(w, _sizes(model, op)), **named)
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
    raise _missing(op)


# -- TensorFlow


def tensorflow_model(model: ReferenceModel) -> Any:
    """As a session's graph with variables, whose nodes have the names of the ops."""
    import tensorflow as tf

    from bitwright_tensorflow import SessionModel

    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        values = {model.graph.inputs[0]: v1.placeholder(tf.float32, (None, *_shape(model)), name=model.graph.inputs[0])}
        for op in model.graph.ops:
            values[op.output] = _tensorflow_op(model, op, [values[t] for t in op.data_inputs])
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    return SessionModel(session, inputs=[values[model.graph.inputs[0]]],
                        outputs=[values[t] for t in model.graph.outputs])  # fmt: skip


def _tensorflow_op(model: ReferenceModel, op: Op, given: list[Any]) -> Any:
    import tensorflow as tf

    v1, x, raw = tf.compat.v1, given[0], tf.raw_ops

    def variable(role: ParamRole, array: Array) -> Any:
        return v1.get_variable(f"{op.id}/{role.value}", initializer=array, use_resource=True)

    def biased(y: Any) -> Any:
        bias = value(model, op, ParamRole.BIAS)
        return y if bias is None else tf.nn.bias_add(y, variable(ParamRole.BIAS, bias), name=f"{op.id}/BiasAdd")

    match op.kind, op.attrs:
        case OpKind.CONV, ConvAttrs() as a:
            weight = np.asarray(model.params[op.params[ParamRole.WEIGHT]])
            run = raw.DepthwiseConv2dNative if is_depthwise(op, weight) else raw.Conv2D
            return biased(run(
                input=x, filter=variable(ParamRole.WEIGHT, kernel(model, op)), strides=[1, *a.strides, 1],
                padding=padding(a, _sizes(model, op)).upper(), dilations=[1, *a.dilations, 1], name=op.id,
            ))  # fmt: skip
        case OpKind.CONV_TRANSPOSE, ConvAttrs() as a:
            sizes = [n or 1 for n in (model.graph.tensors[op.output].shape or ())[2:]]
            w = variable(ParamRole.WEIGHT, kernel(model, op))
            size = tf.stack([tf.shape(x)[0], *sizes, w.shape[2]])
            return biased(raw.Conv2DBackpropInput(
                input_sizes=size, filter=w, out_backprop=x, strides=[1, *a.strides, 1],
                padding=transposed_padding(a).upper(), name=op.id,
            ))  # fmt: skip
        case OpKind.LINEAR, _:
            return biased(tf.matmul(x, variable(ParamRole.WEIGHT, kernel(model, op)), name=op.id))
        case OpKind.BATCH_NORM, BatchNormAttrs(epsilon=epsilon):
            roles = (ParamRole.GAMMA, ParamRole.BETA, ParamRole.MEAN, ParamRole.VAR)
            scale, offset, mean, var = (variable(r, v) for r in roles if (v := value(model, op, r)) is not None)
            return raw.FusedBatchNormV3(
                x=x, scale=scale, offset=offset, mean=mean, variance=var, epsilon=epsilon, is_training=False, name=op.id
            ).y
        case OpKind.RELU, _:
            return tf.nn.relu(x, name=op.id)
        case OpKind.CLIPPED_RELU, ActivationAttrs(minimum=0.0, maximum=6.0):
            return tf.nn.relu6(x, name=op.id)
        case OpKind.MAX_POOL, PoolAttrs(window=ConvAttrs() as w):
            return tf.nn.max_pool2d(x, w.kernel, w.strides, padding(w, _sizes(model, op)).upper(), name=op.id)
        case OpKind.SOFTMAX, AxisAttrs(axis=-1):
            return tf.nn.softmax(x, name=op.id)
        case OpKind.CONCAT, AxisAttrs(axis=1):
            return tf.concat(given, -1, name=op.id)
    match op.type, op.attrs:
        case "LeakyRelu", ActivationAttrs(alpha=alpha):
            return tf.nn.leaky_relu(x, alpha, name=op.id)
        case "GlobalAveragePool", _:
            return tf.reduce_mean(x, [1, 2], keepdims=True, name=op.id)
        case "Flatten", _:
            return tf.reshape(x, [-1, int(np.prod(x.shape[1:]))], name=op.id)
        case "Sigmoid", _:
            return tf.sigmoid(x, name=op.id)
        case "Add" | "Mul", _ if len(given) == 2:
            return (tf.add if op.type == "Add" else tf.multiply)(*given, name=op.id)
    raise _missing(op)
