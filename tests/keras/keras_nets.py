"""Small Keras networks, one for each thing that capturing must cope with."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers as L


def settled(model: keras.Model, seed: int = 0) -> keras.Model:
    """With running statistics and biases that aren't the initial ones."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, L.BatchNormalization) and layer.built:
            n = layer.moving_mean.shape[0]
            layer.moving_mean.assign(rng.normal(0, 0.3, n))
            layer.moving_variance.assign(rng.uniform(0.5, 2, n))
            if layer.scale:
                layer.gamma.assign(rng.uniform(0.5, 1.5, n))
            if layer.center:
                layer.beta.assign(rng.normal(0, 0.2, n))
        elif getattr(layer, "bias", None) is not None and layer.built:
            layer.bias.assign(rng.normal(0, 0.1, layer.bias.shape))
    return model


def residual() -> keras.Model:
    """Convolutions, batch norms, a depthwise one, ReLU6, a residual sum, pooling, a classifier."""
    x = inputs = keras.Input((8, 8, 3), name="x")
    x = L.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    y = L.ReLU(6.0, name="relu6")(L.BatchNormalization(name="bn1")(x))
    z = L.DepthwiseConv2D(3, padding="same", strides=1, use_bias=False, name="depthwise")(y)
    z = L.ReLU(name="relu")(L.BatchNormalization(name="bn2")(z))
    z = L.Conv2D(8, 1, name="pointwise")(z)
    z = L.Activation("relu", name="act")(L.Add(name="add")([z, y]))
    z = L.Dropout(0.3, name="drop")(L.GlobalAveragePooling2D(name="pool")(z))
    return keras.Model(inputs, L.Dense(5, name="fc")(z), name="residual")


def branches() -> keras.Model:
    """Concatenation, max pooling, strided "same" padding, transposed convolutions, an activation as an argument."""
    x = inputs = keras.Input((7, 7, 3), name="x")
    x = L.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="stem")(x)
    right = L.Conv2D(4, 3, padding="same", name="right")(x)
    right = L.MaxPooling2D(3, strides=1, padding="same", name="maxpool")(right)
    y = L.Concatenate(name="concat")([L.Conv2D(4, 1, activation="relu", name="left")(x), right])
    y = L.Conv2DTranspose(6, 4, strides=2, padding="same", use_bias=False, name="up")(y)
    y = L.ReLU(name="relu")(L.BatchNormalization(name="bn")(y))
    return keras.Model(inputs, L.Conv2DTranspose(4, 3, strides=2, name="up2")(y), name="branches")


def separable() -> keras.Model:
    """A separable convolution with a multiplier, nested models, a layer that is called twice."""
    inner = keras.Sequential(
        [keras.Input((6, 6, 6)), L.Conv2D(6, 3, padding="same", name="conv"), L.LeakyReLU(0.1, name="leaky")],
        name="block",
    )
    shared = L.Conv2D(6, 1, activation="relu", name="shared")
    x = inputs = keras.Input((6, 6, 3), name="x")
    x = L.SeparableConv2D(6, 3, padding="same", depth_multiplier=2, activation="relu", name="sep")(x)
    x = shared(shared(inner(x)))
    x = L.AveragePooling2D(2, name="average")(x)
    return keras.Model(inputs, L.Dense(4, activation="softmax", name="fc")(L.Flatten(name="flat")(x)), name="separable")


def transformer() -> keras.Model:
    """Embedding with a mask, attention, layer norm, GELU, sums by operators."""
    ids = keras.Input((7,), dtype="int32", name="ids")
    x = L.Embedding(20, 8, mask_zero=True, name="embed")(ids)
    x = L.LayerNormalization(name="norm")(x + L.MultiHeadAttention(2, 4, name="mha")(x, x))
    y = L.Dense(8, name="f2")(L.Dense(16, activation="gelu", name="f1")(x))
    pooled = keras.ops.mean(x + y, axis=1)
    return keras.Model(ids, L.Dense(3, name="head")(pooled * 0.5), name="transformer")


class Subclassed(keras.Model):
    """A model in Python, with a weight of its own and two outputs."""

    def __init__(self) -> None:
        super().__init__(name="subclassed")
        self.conv = L.Conv2D(4, 3, activation="relu", name="conv")
        self.norm = L.BatchNormalization(name="norm")
        self.drop = L.Dropout(0.2, name="drop")
        self.fc = L.Dense(3, name="fc")
        self.shift = self.add_weight(shape=(4,), initializer="random_normal", name="shift")

    def call(self, x, training=None):
        h = self.norm(self.conv(x), training=training)
        pooled = keras.ops.mean(h, axis=(1, 2)) + self.shift
        return {"logits": self.fc(self.drop(pooled, training=training)), "features": h}


class Block(L.Layer):
    """A custom layer that has only sublayers."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.up = L.Dense(2 * width, activation="relu", name="up")
        self.down = L.Dense(width, name="down")

    def build(self, shape):
        self.up.build(shape)
        self.down.build((*shape[:-1], 2 * self.width))

    def call(self, x):
        return x + self.down(self.up(x))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


class Scale(L.Layer):
    """A custom layer with a weight of its own."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")

    def call(self, x):
        return x * self.factor
