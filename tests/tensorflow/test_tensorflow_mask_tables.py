"""Tables of TensorFlow graphs in which rows are looked up: those of masks stay in float, however they are held; others
keep their grids."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from bitwright.graph import OpKind  # noqa: E402
from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr, verify  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402

v1 = tf.compat.v1
S, D, N = 12, 16, 24
FUTURE = np.triu(np.ones((S, S), bool), 1)
X = np.random.default_rng(0).standard_normal((N, S, D)).astype(np.float32)
ROWS = np.tile(np.arange(S, dtype=np.int32), (N, 1))
W = (np.random.default_rng(1).standard_normal((D, D)) * D**-0.5).astype(np.float32)
VALUES = {
    "-1e4": -1e4,
    "float32's lowest": float(np.finfo(np.float32).min),
    "float16's lowest": float(np.finfo(np.float16).min),
    "float64's lowest": float(np.finfo(np.float64).min),
    "-inf": -np.inf,
}


def triangle(value=-1e4, dtype=np.float32):
    return np.where(FUTURE, value, 0).astype(dtype)


def variable(values, resource=False):
    return v1.get_variable("table", initializer=values, use_resource=resource)


def buckets(rows):
    """One value for each pair of positions, as T5 looks up its biases."""
    later = tf.cast(rows[:, None] > rows[:, :, None], tf.int32)
    return tf.gather(variable(np.float32([[0], [-1e4]])), later)[..., 0]


FORMS = {
    "rows": lambda rows: tf.gather(variable(triangle()), rows),
    "rows of a resource": lambda rows: tf.gather(variable(triangle(), True), rows),
    "looked up as words": lambda rows: tf.nn.embedding_lookup(variable(triangle()), rows),
    "by the difference": buckets,
    "columns": lambda rows: tf.transpose(tf.gather(variable(triangle().T), rows[0], axis=1)),
    "columns of a resource": lambda rows: tf.transpose(tf.gather(variable(triangle().T, True), rows[0], axis=1)),
    "points": lambda rows: tf.gather_nd(variable(triangle()), rows[..., None]),
    "points of a resource": lambda rows: tf.gather_nd(variable(triangle(), True), rows[..., None]),
    "cast ahead": lambda rows: tf.gather(tf.cast(variable(triangle(dtype=np.float16)), tf.float32), rows),
    "the whole": lambda rows: variable(triangle()),
    "a part": lambda rows: variable(np.pad(triangle(), [(0, 4), (0, 4)]))[:S, :S],
    "a part as long as the keys": lambda rows: variable(np.pad(triangle(), [(0, 4), (0, 4)]))[
        : tf.shape(rows)[1], : tf.shape(rows)[1]
    ],
    "flags": lambda rows: (1 - tf.gather(variable((~FUTURE).astype(np.float32)), rows)) * -1e4,
}


def simulate(offset):
    graph = tf.Graph()
    with graph.as_default():
        q = v1.placeholder(tf.float32, [None, S, D], "q")
        rows = v1.placeholder(tf.int32, [None, S], "rows")
        k = tf.einsum("bij,jk->bik", q, v1.get_variable("W", initializer=W))
        scores = tf.multiply(tf.matmul(q, k, transpose_b=True), D**-0.5, name="scores")
        tf.matmul(tf.nn.softmax(scores + offset(rows)), k, name="y")
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    sim = QuantSim(SessionModel(session, ["y:0"], ["q:0", "rows:0"]))
    data = {"q": X, "rows": ROWS}
    return sim, {i: data[i.partition(":")[0]] for i in sim.graph.inputs}


def quality(sim, data):
    return sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0])


@pytest.mark.parametrize("form", FORMS)
def test_looked_up_masks_keep_the_scores(form):
    sim, data = simulate(FORMS[form])
    assert quality(sim.calibrate(data), data) > 30
    assert form == "flags" or not any("table" in site for site in sim.plan.quantized)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("resource", [False, True])
def test_variables_of_masks_export(value, resource, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*overflow.*")
        table = triangle(VALUES[value], np.float64 if "64" in value else np.float32)
        sim, data = simulate(lambda rows: tf.cast(tf.gather(variable(table, resource), rows), tf.float32))
        assert quality(sim.calibrate(data), data) > 30
        if "64" in value:  # the QDQ file holds float32 numbers: −∞ in its place
            with pytest.warns(UserWarning, match="isn't written: not emittable as ONNX"):
                sim.export(tmp_path, name="net")
        else:
            sim.export(tmp_path, name="net")
            assert verify(tmp_path).problems == []


def test_biases_by_position_keep_their_grid():
    values = np.random.default_rng(2).standard_normal((2 * S, 1)).astype(np.float32) * 8
    values[3] = 200
    sim, _ = simulate(lambda rows: tf.gather(variable(values), rows[:, None] - rows[:, :, None] + S)[..., 0])
    assert not any(t.mask for t in sim.graph.tensors.values())
    assert "table" in sim.plan.quantized


@pytest.mark.parametrize("read", ["product", "nothing", "maximum"])
def test_tables_of_words_keep_their_grid(read):
    words = np.random.default_rng(3).standard_normal((50, D)).astype(np.float32)
    words[7, 3] = 1500
    words, places, w = tf.Variable(words, name="words"), tf.Variable(words[:S], name="positions"), tf.Variable(W)

    @tf.function(input_signature=[tf.TensorSpec([None, S], tf.int32, "ids")])
    def function(ids):
        x = tf.gather(words, ids) * 32.0 + tf.gather(places, ids % S)
        return {"product": lambda: tf.nn.softmax(tf.matmul(x, w)), "nothing": lambda: x,
                "maximum": lambda: tf.reduce_max(x, 1)}[read]()  # fmt: skip

    sim = QuantSim(function.get_concrete_function())
    assert not any(t.mask for t in sim.graph.tensors.values())
    tables = [p for op in sim.graph if op.kind is OpKind.EMBEDDING for p in op.params.values()]
    assert len(tables) == 2 and set(tables) <= set(sim.plan.quantized)


def test_masked_classes_in_a_variable_are_no_bias():
    lost, w = tf.Variable(np.float32([0, -1e9, 0, -np.inf])), tf.Variable(W[:, :4])

    @tf.function(input_signature=[tf.TensorSpec([None, D], name="x")])
    def function(x):
        return tf.nn.softmax(tf.matmul(x, w) + lost)

    sim = QuantSim(function.get_concrete_function())
    data = {sim.graph.inputs[0]: X[:, 0]}
    assert quality(sim.calibrate(data), data) > 30
