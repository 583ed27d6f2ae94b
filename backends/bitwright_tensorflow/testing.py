"""The kits' small reference models as TensorFlow users would hold them."""

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


def tensorflow_model(model: ReferenceModel) -> Any:
    """A reference model as a session's graph with variables, whose nodes have the names of the ops."""
    import tensorflow as tf

    from bitwright_tensorflow import SessionModel

    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        values = {
            model.graph.inputs[0]: v1.placeholder(tf.float32, (None, *image_shape(model)), name=model.graph.inputs[0])
        }
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
                padding=padding(a, sizes(model, op)).upper(), dilations=[1, *a.dilations, 1], name=op.id,
            ))  # fmt: skip
        case OpKind.CONV_TRANSPOSE, ConvAttrs() as a:
            output = [n or 1 for n in (model.graph.tensors[op.output].shape or ())[2:]]
            w = variable(ParamRole.WEIGHT, kernel(model, op))
            size = tf.stack([tf.shape(x)[0], *output, w.shape[2]])
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
            return tf.nn.max_pool2d(x, w.kernel, w.strides, padding(w, sizes(model, op)).upper(), name=op.id)
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
    raise NotImplementedError(f"{op.type} isn't brought to TensorFlow yet: add it in bitwright_tensorflow/testing.py")


def model_port() -> ModelPort:
    """See `bitwright.testing.ports`."""
    return ModelPort(tensorflow_model, lambda batch: {f"{k}:0": v for k, v in images(batch).items()})
