"""EfficientNet-Lite0 in Keras, as a TensorFlow v1 session and as a JAX function, with the PyTorch module's weights.

Nothing is converted by a tool: each framework's own layers in the module's order, batch norms and zero padding kept,
images as NHWC.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

IMAGE = (224, 224, 3)


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def kernel(conv: Any) -> np.ndarray:
    """(out, in/groups, h, w) → (h, w, in, out), or (h, w, in, 1) of a depthwise convolution."""
    return array(conv.weight).transpose((2, 3, 0, 1) if conv.groups > 1 else (2, 3, 1, 0))


def skips(module: Any) -> Iterator[tuple[Any, bool]]:
    """The network's stages in order, each a flat sequence of layers, with whether its input is added to its output."""
    for child in module:
        body = getattr(child, "body", child)
        yield (list(body.children()) or [body]), getattr(child, "skip", False)


def keras_model(module: Any) -> Any:
    """A functional `keras.Model`; convolutions and batch norms are called after their place in the module."""
    import keras
    from keras import layers

    x = entry = keras.Input(IMAGE, name="image")
    values: dict[str, list[np.ndarray]] = {}
    count = 0

    def add(layer: Any, x: Any, *weights: np.ndarray) -> Any:
        values[layer.name] = list(weights)
        return layer(x)

    for stage, skip in skips(module):
        start = x
        for layer in stage:
            count += 1
            match type(layer).__name__:
                case "ZeroPad2d":
                    left, right, top, bottom = layer.padding
                    x = layers.ZeroPadding2D(((top, bottom), (left, right)), name=f"pad{count}")(x)
                case "Conv2d":
                    same = {
                        "strides": layer.stride,
                        "padding": "same" if layer.padding[0] else "valid",
                        "use_bias": False,
                    }
                    if layer.groups > 1:
                        made = layers.DepthwiseConv2D(layer.kernel_size, **same, name=f"conv{count}")
                    else:
                        made = layers.Conv2D(layer.out_channels, layer.kernel_size, **same, name=f"conv{count}")
                    x = add(made, x, kernel(layer))
                case "BatchNorm2d":
                    made = layers.BatchNormalization(epsilon=layer.eps, momentum=0.99, name=f"norm{count}")
                    moments = layer.weight, layer.bias, layer.running_mean, layer.running_var
                    x = add(made, x, *map(array, moments))
                case "ReLU6":
                    x = layers.ReLU(6.0, name=f"relu{count}")(x)
                case "AdaptiveAvgPool2d":
                    x = layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x)
                case "Flatten":
                    x = layers.Flatten(name="flatten")(x)
                case "Dropout":
                    x = layers.Dropout(layer.p, name="dropout")(x)
                case "Linear":
                    made = layers.Dense(layer.out_features, name="logits")
                    x = add(made, x, array(layer.weight).T, array(layer.bias))
                case other:
                    raise TypeError(f"no Keras layer for {other}")
        if skip:
            x = layers.Add(name=f"add{count}")([start, x])
    model = keras.Model(entry, x, name="lite0")
    for name, weights in values.items():
        model.get_layer(name).set_weights(weights)
    return model


def tensorflow_session(module: Any) -> tuple[Any, str, str]:
    """A `tf.compat.v1.Session` with variables, and the names of its input and output tensors."""
    import tensorflow as tf

    v1 = tf.compat.v1
    graph = tf.Graph()
    values: dict[str, np.ndarray] = {}
    with graph.as_default():

        def variable(name: str, value: np.ndarray) -> Any:
            values[name] = value
            return v1.get_variable(name, value.shape, tf.float32, use_resource=True)

        x = entry = v1.placeholder(tf.float32, (None, *IMAGE), name="image")
        count = 0
        for stage, skip in skips(module):
            start = x
            for layer in stage:
                count += 1
                match type(layer).__name__:
                    case "ZeroPad2d":
                        left, right, top, bottom = layer.padding
                        x = tf.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), name=f"pad{count}")
                    case "Conv2d":
                        padding = "SAME" if layer.padding[0] else "VALID"
                        strides = (1, *layer.stride, 1)
                        weight = variable(f"conv{count}/kernel", kernel(layer))
                        run = tf.nn.depthwise_conv2d if layer.groups > 1 else tf.nn.conv2d
                        x = run(x, weight, strides, padding, name=f"conv{count}/conv")
                    case "BatchNorm2d":
                        names = ("gamma", "beta", "mean", "variance")
                        moments = layer.weight, layer.bias, layer.running_mean, layer.running_var
                        held = [variable(f"norm{count}/{n}", array(m)) for n, m in zip(names, moments, strict=True)]
                        made = v1.nn.fused_batch_norm(
                            x, *held, epsilon=layer.eps, is_training=False, name=f"norm{count}/norm"
                        )
                        x = made[0]
                    case "ReLU6":
                        x = tf.nn.relu6(x, name=f"relu{count}")
                    case "AdaptiveAvgPool2d":
                        x = tf.reduce_mean(x, (1, 2), keepdims=True, name="pool")
                    case "Flatten":
                        x = tf.reshape(x, (-1, x.shape[-1]), name="flatten")
                    case "Dropout":
                        pass  # v1 graphs for inference are built without it
                    case "Linear":
                        weight = variable("logits/kernel", array(layer.weight).T)
                        x = tf.matmul(x, weight, name="logits/product")
                        x = tf.nn.bias_add(x, variable("logits/bias", array(layer.bias)), name="logits/logits")
                    case other:
                        raise TypeError(f"no TensorFlow op for {other}")
            if skip:
                x = tf.add(start, x, name=f"add{count}")
        session = v1.Session(graph=graph)
        for held in v1.global_variables():
            held.load(values[held.op.name], session)
    return session, entry.name, x.name


def jax_function(module: Any) -> Any:
    """A `bitwright_jax.JaxFunction` (examples/plugins/bitwright_jax), its parameters called after their place."""
    import jax.numpy as jnp
    from bitwright_jax import JaxFunction
    from jax import lax

    params: dict[str, dict[str, np.ndarray]] = {}
    for count, layer in enumerate((layer for stage, _ in skips(module) for layer in stage), 1):
        match type(layer).__name__:
            case "Conv2d":
                weight = array(layer.weight).transpose(2, 3, 1, 0)
                params[f"conv{count}"] = {"kernel": np.ascontiguousarray(weight)}
            case "BatchNorm2d":
                names = ("scale", "bias", "mean", "var")
                moments = layer.weight, layer.bias, layer.running_mean, layer.running_var
                params[f"norm{count}"] = dict(zip(names, map(array, moments), strict=True))
            case "Linear":
                params["logits"] = {"kernel": array(layer.weight).T.copy(), "bias": array(layer.bias)}

    def run(p: Any, image: Any) -> Any:
        x, count = image, 0
        for stage, skip in skips(module):
            start = x
            for layer in stage:
                count += 1
                match type(layer).__name__:
                    case "ZeroPad2d":
                        left, right, top, bottom = layer.padding
                        x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
                    case "Conv2d":
                        padding = "SAME" if layer.padding[0] else "VALID"
                        x = lax.conv_general_dilated(
                            x, p[f"conv{count}"]["kernel"], layer.stride, padding, feature_group_count=layer.groups,
                            dimension_numbers=("NHWC", "HWIO", "NHWC"),
                        )  # fmt: skip
                    case "BatchNorm2d":
                        held = p[f"norm{count}"]
                        x = (x - held["mean"]) / jnp.sqrt(held["var"] + layer.eps) * held["scale"] + held["bias"]
                    case "ReLU6":
                        x = jnp.clip(x, 0, 6)
                    case "AdaptiveAvgPool2d":
                        x = x.mean((1, 2), keepdims=True)
                    case "Flatten":
                        x = x.reshape(x.shape[0], -1)
                    case "Linear":
                        x = x @ p["logits"]["kernel"] + p["logits"]["bias"]
            x = start + x if skip else x
        return x

    return JaxFunction(run, params)
