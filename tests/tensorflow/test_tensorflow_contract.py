"""The TensorFlow backend holds the backend contract."""

from functools import cache
from typing import ClassVar

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

import tfnets  # noqa: E402
from shares import EVERY  # noqa: E402

from bitwright.testing.backend_contract import BackendContract, Case, Held  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402
from bitwright_tensorflow.backend import TensorFlowBackend  # noqa: E402
from bitwright_tensorflow.graph.params import native_value, read_of  # noqa: E402


def in_session(build, *shape, samples=4, **options):
    @cache  # models are immutable
    def opened():
        return TensorFlowBackend().adopt(tfnets.session_model(build, *shape, **options))

    return Case(opened, {"x:0": tfnets.image(samples, *shape)})


def as_function(build, *shape, samples=4):
    @cache
    def opened():
        return TensorFlowBackend().adopt(tfnets.Module(build, *shape).call.get_concrete_function())

    return Case(opened, {"x:0": tfnets.image(samples, *shape)})


def prenormed(net, x):
    """Batch norms before linear ops, average pooling."""
    x = tf.nn.leaky_relu(net.conv("c1", net.batch_norm("bn_in", x), 4, padding="VALID"), 0.2, name="act1")
    x = tf.nn.relu(net.conv("c2", net.batch_norm("bn_mid", x, fused=False), 4), name="act2")
    x = tf.nn.avg_pool2d(x, 2, 2, "SAME", name="average")
    return net.dense("fc", tf.reshape(x, [-1, 2 * 2 * 4], name="flat"), 5)


@cache
def tokens():
    """Ids and floats in, two outputs; an embedding that is the output layer too, a mask, layer norm."""
    v1 = tf.compat.v1
    graph = tf.Graph()
    with graph.as_default():
        net = tfnets.Net()
        ids, side = v1.placeholder(tf.int32, (None, 5), "ids"), v1.placeholder(tf.float32, (None, 5, 8), "side")
        table = net.variable("table", 12, 8)
        x = tf.add(tf.gather(table, ids, name="embedded"), side, name="sum")
        mean, var = tf.nn.moments(x, [-1], keepdims=True)
        gamma, beta = net.variable("gamma", 8, low=0.5, high=1.5), net.variable("beta", 8)
        x = tf.nn.batch_normalization(x, mean, var, beta, gamma, 1e-5, name="norm")
        scores = tf.add(tf.matmul(x, x, transpose_b=True, name="scores"), np.triu(np.full((5, 5), -1e9, "f"), 1))
        y = tf.matmul(tf.nn.softmax(scores, name="weights"), x, name="mix")
        y = tf.multiply(y, tf.tanh(side, name="gate"), name="gated")
        y = tf.transpose(tf.transpose(y, [0, 2, 1], name="turned"), [0, 2, 1], name="back")
        flat = tf.reshape(y, [-1, 8], name="rows")
        logits = tf.matmul(flat, table, transpose_b=True, name="logits")
        logits = tf.reshape(logits, [-1, 5, 12], name="by_place")
        beside = tf.nn.leaky_relu(y, 0.2, name="beside")  # a frozen graph's outputs are what nothing reads
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
    return TensorFlowBackend().adopt(SessionModel(session, inputs=[ids, side], outputs=[logits, beside]))


def two_inputs():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 12, (4, 5)).astype(np.int32)
    return Case(tokens, {"ids:0": ids, "side:0": rng.normal(size=(4, 5, 8)).astype(np.float32)})


CASES = {
    "residual": in_session(tfnets.residual, 8, 8, 3, samples=8),
    "residual trained, reference variables": in_session(tfnets.residual, 8, 8, 3, resource=False, train=True),
    "residual function": as_function(tfnets.residual, 8, 8, 3),
    "branches": in_session(tfnets.branches, 8, 8, 3, resource=False),
    "decoder": in_session(tfnets.decoder, 5, 5, 3),
    "mlp": in_session(tfnets.mlp, 10, samples=8),
    "prenormed": in_session(prenormed, 6, 6, 3),
    "tokens": two_inputs(),
}


class Odd(tf.Module):
    """One product, times what its code makes of what no graph holds."""

    def __init__(self, factor):
        super().__init__()
        self.w, self.factor, self.calls = tf.Variable(tfnets.image(6, 4)), factor, 0

    def __call__(self, x):
        self.calls += 1
        return tf.matmul(x, self.w) * self.factor(self, x)


ODD = {
    "how often it was called": lambda net, x: float(net.calls),
    "whether it is traced": lambda net, x: 2.0 if tf.executing_eagerly() else 1.0,
    "how many samples there are": lambda net, x: float(x.shape[0] or 1),
    "whether it is one sample": lambda net, x: 2.0 if x.shape[0] == 1 else 1.0,
}


def held(factor, odd="", compiled=False):
    def run_it(model, batch):
        return [model(tf.constant(batch["x"])).numpy()]

    return Held(lambda: tf.function(Odd(factor)) if compiled else Odd(factor), run_it,
                {"x": tfnets.image(4, 6)}, odd)  # fmt: skip


class TestTensorFlowContract(BackendContract):
    every = EVERY
    suffix = ".pb"
    declines: ClassVar = {"recurrent": "in TensorFlow's graphs recurrent layers are loops of ops, and shown as such"}

    def backend(self):
        return TensorFlowBackend()

    def native_value(self, model, param):
        return native_value(model, read_of(model, param).source)

    def descend(self, simulation, batch, cotangents, rate):
        v1, model = tf.compat.v1, simulation.model
        with model.graph.as_default():
            given = {model.graph.get_tensor_by_name(t): v for t, v in batch.items()}
            names = TensorFlowBackend().graph(simulation.float_model()).outputs
            pairs = zip(names, map(model.graph.get_tensor_by_name, model.outputs), strict=True)
            loss = tf.add_n([tf.reduce_sum(y * cotangents[t]) for t, y in pairs if t in cotangents])
            step = v1.train.GradientDescentOptimizer(rate, name="step").minimize(loss)
        model.initialize()
        model.session.run(step, given)

    def held(self):
        made = {what: held(f, what) for what, f in ODD.items()}
        return {"module": held(lambda net, x: 2.0), "function": held(lambda net, x: 2.0, compiled=True), **made}

    def cases(self):
        return CASES
