"""Calibration by the user's own forward pass gives the very encodings that the same data give, on every framework."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.runs import fingerprint
from bitwright.simulation import QuantSim

RNG = np.random.default_rng(3)
BATCHES = [RNG.normal(size=(n, 6)).astype(np.float32) for n in (4, 4, 3)]


def assert_same(sim, run, data=BATCHES):
    """By the default scheme, which goes over the data twice."""
    before = fingerprint.of_params(sim.params)
    a, b = sim.fork().calibrate(run), sim.fork().calibrate(data)
    assert len(b.encodings) > 2
    assert fingerprint.of_encodings(a.encodings) == fingerprint.of_encodings(b.encodings)
    assert fingerprint.of_params(a.params) == before


def test_torch():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)

        def forward(self, x, scale=None):
            x = torch.relu(self.norm(self.a(x)))
            return self.b(x if scale is None else x * scale)

    torch.manual_seed(0)
    x = torch.from_numpy(BATCHES[0])
    sim = QuantSim(Net(), x)

    def run(model):
        assert isinstance(model, torch.nn.Module)
        model.train()  # the running statistics that move are a copy's
        device = next(model.parameters()).device
        with torch.no_grad():
            assert [model(torch.from_numpy(x).to(device)).shape[1] for x in BATCHES] == [3] * 3

    assert_same(sim, run)
    pairs = [(x, np.abs(x[:, :1])) for x in BATCHES]
    two = QuantSim(Net(), (x, x[:, :1]))
    assert_same(two, lambda m: [m(torch.from_numpy(x), scale=torch.from_numpy(s)) for x, s in pairs], pairs)
    assert_same(two, lambda m: [m(scale=torch.from_numpy(s), x=torch.from_numpy(x)) for x, s in pairs], pairs)


def test_torch_in_parts():
    torch = pytest.importorskip("torch")
    from bitwright_torch import capture

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU()), torch.nn.Linear(8, 3)

        def forward(self, x):
            y = self.a(x)
            return self.b(y * 2 if float(y.detach().sum()) > 0 else y)

    sim = QuantSim(capture(Net(), torch.from_numpy(BATCHES[0]), modules=["a", "b"]))
    assert_same(sim, lambda model: [model(torch.from_numpy(x)) for x in BATCHES])


def test_keras():
    keras = pytest.importorskip("keras")
    x = keras.Input((6,), name="x")
    y = keras.layers.Dense(8, activation="relu", name="a")(x)
    sim = QuantSim(keras.Model(x, keras.layers.Dense(3, name="b")(y)))
    assert_same(sim, lambda model: [model(x) for x in BATCHES])
    assert_same(sim, lambda model: [model(x, training=False) for x in BATCHES])
    whole, labels = np.concatenate(BATCHES), np.zeros((11, 3))
    assert_same(sim, lambda model: model.predict(whole, batch_size=4, verbose=0))

    def evaluated(model):
        assert isinstance(model, keras.Model)
        model.compile(loss="mse")
        assert np.isfinite(model.evaluate(whole, labels, batch_size=4, verbose=0))

    assert_same(sim, evaluated)


def test_keras_with_inputs_by_name():
    keras = pytest.importorskip("keras")
    x, s = keras.Input((6,), name="x"), keras.Input((1,), name="s")
    y = keras.layers.Dense(8, name="a")(keras.layers.Multiply(name="m")([x, s]))
    sim = QuantSim(keras.Model({"x": x, "s": s}, keras.layers.Dense(3, name="b")(y)))
    pairs = [{"s": np.abs(x[:, :1]), "x": x} for x in BATCHES]
    assert_same(sim, lambda model: [model(pair) for pair in pairs], pairs)
    assert_same(sim, lambda model: [model(dict(reversed(pair.items()))) for pair in pairs], pairs)
    listed = QuantSim(keras.Model([x, s], keras.layers.Dense(3, name="c")(y)))
    assert_same(listed, lambda model: [model([pair["x"], pair["s"]]) for pair in pairs], pairs)


def test_tensorflow_sessions():
    tf = pytest.importorskip("tensorflow")
    from bitwright_tensorflow import SessionModel

    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, (None, 6), name="x")
        rate = tf.compat.v1.placeholder_with_default(tf.constant(0.0), (), name="rate")
        w = tf.compat.v1.get_variable("w", (6, 3), initializer=tf.random_normal_initializer(seed=1), use_resource=True)
        tf.nn.relu(tf.matmul(x, w) + rate * 0.0, name="y")
        session = tf.compat.v1.Session(graph=graph)
        session.run(tf.compat.v1.global_variables_initializer())
    sim = QuantSim(SessionModel(session, inputs=["x"], outputs=["y"]))

    def run(session):
        assert isinstance(session, tf.compat.v1.Session)
        assert session.run("w/Read/ReadVariableOp:0").shape == (6, 3)  # runs without data are not the model's
        x = session.graph.get_tensor_by_name("x:0")
        for batch in BATCHES:
            assert session.run("y:0", {x: batch}).shape[1] == 3

    def run_by_name(session):
        with session.as_default(), session.graph.as_default():
            y = session.graph.get_tensor_by_name("y:0")
            for batch in BATCHES:
                y.eval({"x:0": batch, "rate:0": 0.0})

    assert_same(sim, run)
    assert_same(sim, run_by_name)


def test_tensorflow_functions():
    tf = pytest.importorskip("tensorflow")
    w = tf.Variable(RNG.normal(size=(6, 3)).astype(np.float32))
    function = tf.function(lambda x: tf.nn.relu(x @ w), input_signature=[tf.TensorSpec((None, 6), name="x")])
    sim = QuantSim(function)
    assert_same(sim, lambda model: [model(tf.constant(x)) for x in BATCHES])
    assert_same(sim, lambda model: [model(x=x) for x in BATCHES])


def test_onnx():
    onnx = pytest.importorskip("onnx")
    weights = {"w": RNG.normal(size=(6, 8)).astype(np.float32), "v": RNG.normal(size=(8, 3)).astype(np.float32)}
    nodes = [("MatMul", ["x", "w"], ["p"]), ("Relu", ["p"], ["q"]), ("MatMul", ["q", "v"], ["y"])]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, i, o) for op, i, o in nodes],
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ("N", 6))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ("N", 3))],
        [onnx.numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    sim = QuantSim(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8))

    def run(session):
        name = session.get_inputs()[0].name
        for batch in BATCHES:
            (found,) = session.run(None, {name: batch})
            np.testing.assert_allclose(found, np.maximum(batch @ weights["w"], 0) @ weights["v"], rtol=1e-4, atol=1e-5)

    assert_same(sim, run)
    assert_same(sim, lambda session: [session({"x": batch}) for batch in BATCHES])
