"""The Keras backend holds the backend contract."""

from functools import cache
from typing import ClassVar

import pytest

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

import keras_nets as nets  # noqa: E402
import numpy as np  # noqa: E402
from shares import EVERY  # noqa: E402

from bitwright.testing.backend_contract import BackendContract, Case, Held  # noqa: E402
from bitwright_keras.backend import KerasBackend  # noqa: E402
from bitwright_keras.graph.canonical import canonical  # noqa: E402
from bitwright_keras.graph.params import native_value  # noqa: E402


def case(build, tolerance=1e-5, **inputs):
    @cache  # edits never change a model, and the contract checks that
    def captured():
        keras.utils.set_random_seed(0)
        return KerasBackend().adopt(nets.settled(build()))

    return Case(captured, inputs, tolerance)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def prenormed():
    """Batch norms before linear ops, a PReLU, average pooling, two outputs."""
    L = keras.layers
    x = inputs = keras.Input((6, 6, 3), name="x")
    x = L.LeakyReLU(0.2, name="leaky")(L.Conv2D(4, 3, name="c1")(L.BatchNormalization(name="bn_in")(x)))
    x = L.Conv2D(4, 3, padding="same", name="c2")(L.BatchNormalization(name="bn_mid")(x))
    x = L.PReLU(shared_axes=[1, 2], alpha_initializer="ones", name="prelu")(x)
    y = L.Flatten(name="flat")(L.AveragePooling2D(2, name="average")(x))
    gated = L.Multiply(name="gated")([y, L.Activation("sigmoid", name="gate")(y)])
    return keras.Model(inputs, [L.Dense(5, name="fc")(gated), y], name="prenormed")


def sequence():
    """Two inputs; scores with a mask, an LSTM and a GRU."""
    L = keras.layers
    x, scale = keras.Input((5, 6), name="x"), keras.Input((5, 1), name="scale")
    triangle = np.triu(np.full((5, 5), -1e9, np.float32), 1)
    scores = keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1))) + triangle
    y = keras.ops.matmul(keras.ops.softmax(scores), x) * scale
    y = L.GRU(3, return_sequences=True, name="gru")(L.LSTM(4, return_sequences=True, name="lstm")(y))
    return keras.Model([x, scale], L.Dense(4, name="fc")(y), name="sequence")


IDS = np.random.default_rng(0).integers(0, 12, (4, 7)).astype(np.int32)
CASES = {
    "residual": case(nets.residual, x=normal(8, 8, 8, 3)),
    "branches": case(nets.branches, x=normal(4, 7, 7, 3)),
    "separable": case(nets.separable, x=normal(4, 6, 6, 3)),
    "transformer": case(nets.transformer, ids=IDS),
    "prenormed": case(prenormed, x=normal(4, 6, 6, 3)),
    "sequence": case(sequence, x=normal(4, 5, 6), scale=normal(4, 5, 1)),
}


class Odd(keras.Model):
    """A dense layer, times what its code makes of what no graph holds."""

    def __init__(self, factor):
        super().__init__()
        self.fc, self.factor, self.calls = keras.layers.Dense(4), factor, 0

    def call(self, x):
        self.calls += 1
        return self.fc(x) * self.factor(self, x)


ODD = {
    "how often it was called": lambda net, x: float(net.calls),
    "whether it is traced": lambda net, x: 2.0 if isinstance(x, keras.KerasTensor) else 1.0,
    "how many samples there are": lambda net, x: float(x.shape[0] or 1),
    "whether it is one sample": lambda net, x: 2.0 if x.shape[0] == 1 else 1.0,
}


class Counting(keras.layers.Layer):
    """It has a weight, so that it stays one op; its copy counts for itself."""

    def build(self, shape):
        self.scale, self.calls = self.add_weight(shape=(shape[-1],), initializer="ones"), 0

    def call(self, x):
        self.calls += 1
        return x * self.scale * float(self.calls)


def counting():
    x = keras.Input((6,), name="x")
    return keras.Model(x, Counting()(x))


def held(build, odd="", **inputs):
    def made():
        keras.utils.set_random_seed(0)
        model = build()
        if not model.built:
            model.fc.build((None, 6))
        return nets.settled(model)

    def run_it(model, batch):
        found = model([keras.ops.convert_to_tensor(v) for v in batch.values()] if len(batch) > 1
                      else keras.ops.convert_to_tensor(*batch.values()), training=False)  # fmt: skip
        return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(found)]

    return Held(made, run_it, inputs, odd, sample=next(iter(inputs.values())))


def gradients(loss, variables):
    """Of a function's value by Keras's variables, by whichever backend it runs on."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.autograd.grad(loss(), [v.value for v in variables], allow_unused=True)
    with tf.GradientTape() as tape:
        value = loss()
    # Those of an embedding come as rows and their numbers.
    found = tape.gradient(value, [v.value for v in variables])
    return [None if g is None else tf.convert_to_tensor(g) for g in found]


class TestKerasContract(BackendContract):
    every = EVERY
    suffix = ".keras"
    demanding = frozenset({"tflite"})  # test_tflite.py has plans that fit
    declines: ClassVar = {"recurrent": "Keras's recurrent layers are opaque, and run in float"}

    def backend(self):
        return KerasBackend()

    def native_value(self, model, param):
        return native_value(canonical(model).places[param])

    def descend(self, simulation, batch, cotangents, rate):
        model = simulation.model
        names = KerasBackend().graph(simulation.float_model()).outputs
        given = list(batch.values())

        def loss():
            outputs = model(given if len(given) > 1 else given[0], training=False)
            pairs = zip(names, outputs if isinstance(outputs, list) else [outputs], strict=True)
            return sum(
                keras.ops.sum(y * keras.ops.convert_to_tensor(cotangents[t])) for t, y in pairs if t in cotangents
            )

        variables = model.trainable_variables
        for variable, gradient in zip(variables, gradients(loss, variables), strict=True):
            if gradient is not None:
                variable.assign_sub(rate * keras.ops.convert_to_tensor(gradient))

    def held(self):
        odd = {what: held(lambda f=f: Odd(f), what, x=normal(4, 6)) for what, f in ODD.items()}
        odd["a layer's calls"] = held(counting, "how often it was called", x=normal(4, 6))
        plain = {"prenormed": held(prenormed, x=normal(4, 6, 6, 3)), "transformer": held(nets.transformer, ids=IDS)}
        return {**plain, "subclassed": held(lambda: Odd(lambda net, x: 2.0), x=normal(4, 6)), **odd}

    def cases(self):
        return CASES
