"""Small TensorFlow networks for tests, as v1 graphs with variables and as functions; weights are drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from bitwright_tensorflow import SessionModel

v1 = tf.compat.v1


class Net:
    """Draws variables into the default graph; NHWC.

    Args:
        resource: whether variables are resource variables or TF 1 reference variables.
        seed: of the values.
    """

    def __init__(self, *, resource: bool = True, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.resource = resource

    def variable(self, name, *shape, low=None, high=None, scale=0.4):
        value = self.rng.normal(0, scale, shape) if low is None else self.rng.uniform(low, high, shape)
        return v1.get_variable(name, initializer=value.astype(np.float32), use_resource=self.resource)

    def conv(self, name, x, out, kernel=3, *, stride=1, padding="SAME", dilation=1, groups=1, bias=True):
        with v1.variable_scope(name):
            w = self.variable("kernel", kernel, kernel, x.shape[-1] // groups, out)
            y = tf.nn.conv2d(x, w, [1, stride, stride, 1], padding, dilations=[1, dilation, dilation, 1], name="Conv2D")
            return tf.nn.bias_add(y, self.variable("bias", out), name="BiasAdd") if bias else y

    def depthwise(self, name, x, kernel=3, *, stride=1, multiplier=1, bias=True):
        with v1.variable_scope(name):
            w = self.variable("kernel", kernel, kernel, x.shape[-1], multiplier)
            y = tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], "SAME")
            return tf.nn.bias_add(y, self.variable("bias", y.shape[-1])) if bias else y

    def transposed(self, name, x, out, kernel=3, *, stride=2, padding="SAME", bias=True):
        with v1.variable_scope(name):
            w = self.variable("kernel", kernel, kernel, out, x.shape[-1])
            size = [n * stride if padding == "SAME" else (n - 1) * stride + kernel for n in x.shape[1:3]]
            y = tf.nn.conv2d_transpose(x, w, [tf.shape(x)[0], *size, out], [1, stride, stride, 1], padding)
            return tf.nn.bias_add(y, self.variable("bias", out)) if bias else y

    def dense(self, name, x, out, *, bias=True):
        with v1.variable_scope(name):
            y = tf.matmul(x, self.variable("kernel", x.shape[-1], out), name="MatMul")
            return tf.add(y, self.variable("bias", out), name="add") if bias else y

    def batch_norm(self, name, x, *, fused=True, epsilon=1e-3):
        with v1.variable_scope(name):
            n = x.shape[-1]
            gamma, beta = self.variable("gamma", n, low=0.5, high=2.0), self.variable("beta", n)
            mean, var = self.variable("moving_mean", n), self.variable("moving_variance", n, low=0.5, high=2.0)
            if fused:
                return v1.nn.fused_batch_norm(x, gamma, beta, mean, var, epsilon, is_training=False, name="norm")[0]
            return tf.nn.batch_normalization(x, mean, var, beta, gamma, epsilon, name="norm")


def residual(net: Net, x):
    """conv → norm → ReLU6 → depthwise → norm → ReLU → + → pools → dense."""
    x = tf.nn.relu6(net.batch_norm("bn1", net.conv("conv1", x, 8, bias=False, stride=2)), name="act1")
    y = net.batch_norm("bn2", net.depthwise("dw", x, bias=False), fused=False)
    y = tf.nn.relu(y, name="act2")
    x = tf.add(x, y, name="sum")
    x = tf.reduce_mean(x, [1, 2], name="pool")
    return tf.identity(net.dense("fc", x, 5), name="logits")


def branches(net: Net, x):
    """Two branches concatenated; max pooling, grouped and dilated convolutions, a shared weight."""
    x = tf.nn.relu(net.conv("stem", x, 4), name="act0")
    left = tf.nn.leaky_relu(net.conv("left", x, 4, 1), 0.1, name="act1")
    right = tf.nn.max_pool2d(net.conv("right", x, 4, dilation=2), 3, 1, "SAME", name="maxpool")
    y = tf.concat([left, right], 3, name="concat")
    y = net.conv("head", y, 6, stride=2, groups=2, padding="VALID")
    return tf.nn.softmax(tf.reshape(y, [-1, 3 * 3 * 6], name="flat"), name="prob")


def decoder(net: Net, x):
    """conv → transposed conv → norm → ReLU → transposed conv of another padding."""
    x = tf.nn.relu(net.conv("conv", x, 8), name="act1")
    x = net.batch_norm("bn", net.transposed("up1", x, 6, 4, bias=False))
    x = tf.nn.relu(x, name="act2")
    return net.transposed("up2", x, 4, 3, padding="VALID")


def mlp(net: Net, x):
    """Dense layers, one of them without bias, one of them run twice."""
    x = tf.nn.relu(net.dense("fc1", x, 10), name="act1")
    x = tf.nn.relu(net.dense("fc2", x, 10, bias=False), name="act2")
    with v1.variable_scope("", reuse=v1.AUTO_REUSE):
        w = next(v for v in v1.global_variables() if v.name == "fc2/kernel:0")
        x = tf.matmul(x, w, name="again")
    return tf.nn.softmax(net.dense("fc3", x, 4), name="prob")


def session_model(build: Callable, *shape: int, resource: bool = True, seed: int = 0, train: bool = False):
    """A session with the network between the placeholder "x" and its output."""
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(tf.float32, (None, *shape), name="x")
        y = build(Net(resource=resource, seed=seed), x)
        if train:
            labels = v1.placeholder(tf.int64, (None,), name="labels")
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, y), name="loss")
            v1.train.AdamOptimizer(1e-2).minimize(loss, name="train")
        v1.train.Saver(name="save")
        start = v1.global_variables_initializer()
    session = v1.Session(graph=graph)
    session.run(start)
    return SessionModel(session, inputs=["x"], outputs=[y])


class Module(tf.Module):
    """A network whose variables are made once, for functions."""

    def __init__(self, build: Callable, *shape: int, seed: int = 0) -> None:
        super().__init__()
        model = session_model(build, *shape, seed=seed)
        graph = model.session.graph
        with graph.as_default():
            names = [v.op.name for v in v1.global_variables()]
            values = model.session.run(v1.global_variables())
        self.weights = {n: tf.Variable(v, name=n) for n, v in zip(names, values, strict=True)}
        self.build = build
        self.call = tf.function(self.run, input_signature=[tf.TensorSpec((None, *shape), tf.float32, "x")])

    def run(self, x):
        return self.build(Given(self.weights), x)


class Given(Net):
    """Takes variables that there are."""

    def __init__(self, weights) -> None:
        super().__init__()
        self.weights = weights
        self.scopes: list[str] = []

    def variable(self, name, *shape, **_):
        scope = v1.get_variable_scope().name
        return self.weights[f"{scope}/{name}"]


def image(*shape: int, seed: int = 1) -> np.ndarray:
    """Normal float32 data."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
