"""Norms, softmax and activations written out in keras.ops are one op, in Keras models and in TensorFlow graphs."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

from keras import layers as L  # noqa: E402
from keras import ops  # noqa: E402

from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402

D = 32
GAMMA = np.random.default_rng(1).uniform(0.5, 1.5, D).astype(np.float32)


def rms(x):
    return x * ops.rsqrt(ops.mean(ops.square(x), -1, keepdims=True) + 1e-6) * GAMMA


def layer(x):
    d = x - ops.mean(x, -1, keepdims=True)
    return d / ops.sqrt(ops.mean(d * d, -1, keepdims=True) + 1e-6) * GAMMA + 0.5


def unit(x):
    return x / ops.maximum(ops.sqrt(ops.sum(ops.square(x), -1, keepdims=True)), 1e-6)


def distance(x):
    """No norm, but squares of twice its range."""
    return ops.sqrt(ops.maximum(ops.sum(ops.square(x - GAMMA), -1, keepdims=True), 1e-6)) + GAMMA


def net(norm):
    keras.utils.set_random_seed(0)
    x = L.Input((8, D), name="x")
    return keras.Model(x, L.Dense(D, use_bias=False)(norm(L.Dense(D, use_bias=False)(x))))


@pytest.fixture(scope="module")
def data():
    x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(np.float32)
    x[:, 0] *= 1000
    return x


@pytest.mark.parametrize("norm", [rms, layer, unit, distance], ids=lambda f: f.__name__)
def test_a_norm_that_is_written_out_is_one_op(norm, data):
    sim = QuantSim(net(norm), activations="uint16", scheme="minmax").calibrate(data)
    expected, found = (sim.predict(data, simulated=s)[0][:, 1:] for s in (False, True))
    assert sqnr(expected, found) >= (20 if norm is distance else 25)


@pytest.mark.parametrize("norm", [rms, layer, unit, distance], ids=lambda f: f.__name__)
def test_a_norm_in_a_tensorflow_graph_is_one_op(norm, data):
    model = net(norm)
    function = tf.function(model, input_signature=[tf.TensorSpec([None, 8, D], name="x")])
    sim = QuantSim(function.get_concrete_function(), activations="uint16", scheme="minmax").calibrate(data)
    expected, found = (sim.predict(data, simulated=s)[0][:, 1:] for s in (False, True))
    assert sqnr(expected, found) >= (20 if norm is distance else 25)


def softmax(x):
    e = ops.exp(x)
    return e / ops.sum(e, -1, keepdims=True)


def log_softmax(x):
    shifted = x - ops.max(x, -1, keepdims=True)
    return ops.log(ops.softmax(x, -1) + 1e-6) + shifted - ops.log(ops.sum(ops.exp(shifted), -1, keepdims=True))


def softplus(x):
    return ops.log(1 + ops.exp(x)) * (1 / (1 + ops.exp(-x)))


def elu(x):
    return ops.where(x > 0, x, ops.exp(x) - 1)


@pytest.mark.parametrize("graph", [False, True], ids=["keras", "tensorflow"])
@pytest.mark.parametrize("made", [softmax, log_softmax, softplus, elu], ids=lambda f: f.__name__)
def test_exponentials_below_a_sum_have_no_grid(made, graph):
    """Those of arguments to 20 lie nine powers of ten apart."""
    model = net(made)
    model.layers[1].set_weights([np.random.default_rng(2).standard_normal((D, D)).astype(np.float32)])
    x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(np.float32)
    if graph:
        model = tf.function(model, input_signature=[tf.TensorSpec([None, 8, D], name="x")]).get_concrete_function()
    sim = QuantSim(model, activations="uint16", weights="int16", scheme="minmax").calibrate(x)
    expected, found = (sim.predict(x, simulated=s)[0] for s in (False, True))
    assert sqnr(expected, found) >= 55


def test_moments_in_a_tensorflow_graph_are_one_op(data):
    w = np.random.default_rng(2).standard_normal((D, D)).astype(np.float32)

    @tf.function(input_signature=[tf.TensorSpec([None, 8, D], name="x")])
    def function(x):
        h = tf.linalg.matmul(x, w)
        mean, variance = tf.nn.moments(h, [-1], keepdims=True)
        return tf.linalg.matmul((h - mean) * tf.math.rsqrt(variance + 1e-6) * GAMMA, w)

    sim = QuantSim(function.get_concrete_function(), activations="uint16", scheme="minmax").calibrate(data)
    expected, found = (sim.predict(data, simulated=s)[0][:, 1:] for s in (False, True))
    assert sqnr(expected, found) >= 25
