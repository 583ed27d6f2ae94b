"""Variables that inference changes: what a capture can't follow is refused or told."""

import warnings

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from bitwright import QuantSim  # noqa: E402
from bitwright.errors import ModelError  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402

v1 = tf.compat.v1
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


class Net(tf.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way
        self.w = tf.Variable(np.eye(3, dtype=np.float32), name="w")
        self.v = tf.Variable([1.0, 1.0, 1.0], name="v")
        self.rows = tf.Variable(np.ones((2, 3), np.float32), name="rows")
        self.count = tf.Variable(0, name="count")

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
    def __call__(self, x):
        return self.way(self, x)


def first(net, x):
    net.v.assign([3.0, 3.0, 3.0])
    return tf.matmul(x, net.w) * net.v


def first_by_adding(net, x):
    net.v.assign_add(tf.reduce_mean(x, 0))
    return tf.matmul(x, net.w) * net.v


def first_rows(net, x):
    net.rows.assign(net.rows * 2.0)
    return tf.matmul(x, net.w) * tf.gather(net.rows, [1])


def first_scattered(net, x):
    net.rows.scatter_nd_update([[1]], [[5.0, 5.0, 5.0]])
    return tf.matmul(x, net.w) * net.rows[1]


@pytest.mark.parametrize("way", [first, first_by_adding, first_rows, first_scattered])
@pytest.mark.parametrize("saved", [False, True])
def test_what_is_assigned_and_then_read_is_refused(way, saved, tmp_path):
    net = Net(way)
    with pytest.raises(ModelError, match=r"assigns to the variable '(v|rows)"):
        if saved:
            tf.saved_model.save(net, str(tmp_path), signatures=net.__call__)
            QuantSim(tmp_path)
        else:
            QuantSim(net, X)


def afterwards(net, x):
    y = tf.matmul(x, net.w) * net.v
    net.v.assign_add([1.0, 1.0, 1.0])
    return y


def test_what_is_changed_afterwards_is_told():
    with pytest.warns(UserWarning, match=r"changes variables that its results are computed from \('v'\)"):
        QuantSim(Net(afterwards), X)


def counting(net, x):
    net.count.assign_add(1)
    return tf.matmul(x, net.w) * net.v


def handed_on(net, x):
    now = net.v + tf.reduce_mean(x, 0)
    net.rows.assign(tf.stack([now, now]))
    return tf.matmul(x, net.w) * now


@pytest.mark.parametrize("way", [counting, handed_on])
def test_what_the_results_do_not_hang_on_is_not(way):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QuantSim(Net(way), X)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("resource", [False, True])
def test_sessions_run_what_their_outputs_wait_for(waits, resource):
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 3), name="x")
        w = v1.get_variable("w", initializer=np.eye(3, dtype=np.float32), use_resource=resource)
        v = v1.get_variable("v", initializer=np.ones(3, np.float32), use_resource=resource)
        change = v1.assign(v, [3.0, 3.0, 3.0])
        with tf.control_dependencies([change] if waits else []):
            read = v.read_value() if resource else tf.identity(v)
        tf.multiply(tf.matmul(x, w), read, name="y")
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())
        given = SessionModel(session, inputs=["x"], outputs=["y"])
        if waits:
            with pytest.raises(ModelError, match="assigns to the variable 'v'"):
                QuantSim(given)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                QuantSim(given)
