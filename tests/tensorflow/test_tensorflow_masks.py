"""Attention masks in TensorFlow graphs: whatever the form, masked scores don't set the grid of the others."""

from __future__ import annotations

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402
from bitwright_tensorflow import SessionModel  # noqa: E402

v1 = tf.compat.v1
S, D, N = 12, 16, 24
KEPT = np.tile(np.arange(S) < 8, (N, 1, 1))
X = np.random.default_rng(0).standard_normal((N, S, D)).astype(np.float32)
TRIANGLE = np.triu(np.full((S, S), -1e4, np.float32), 1)
W = (np.random.default_rng(1).standard_normal((D, D)) * D**-0.5).astype(np.float32)


def simulate(masked, dtype, *, uses_mask=True, **options):
    graph = tf.Graph()
    with graph.as_default():
        q = v1.placeholder(tf.float32, [None, S, D], "q")
        mask = v1.placeholder(dtype, [None, 1, S], "mask")
        k = tf.einsum("bij,jk->bik", q, v1.get_variable("W", initializer=W))
        scores = tf.multiply(tf.matmul(q, k, transpose_b=True), D**-0.5, name="scores")
        tf.matmul(tf.nn.softmax(masked(scores, mask)), k, name="y")
        session = v1.Session()
        session.run(v1.global_variables_initializer())
    inputs = ["q:0", "mask:0"] if uses_mask else ["q:0"]
    return QuantSim(SessionModel(session, ["y:0"], inputs), **options)


def inverse(mask):
    return 1.0 - tf.cast(mask, tf.float32)


FORMS = {
    "triangle": (lambda s, mask: s + TRIANGLE, tf.bool),
    "triangle of -inf": (lambda s, mask: s + np.where(TRIANGLE < 0, np.float32(-np.inf), TRIANGLE), tf.bool),
    "band": (lambda s, mask: s - 1e10 * (1 - tf.linalg.band_part(tf.ones([S, S]), -1, 0)), tf.bool),
    "where": (lambda s, mask: tf.where(mask, s, -1e9), tf.bool),
    "-1e9": (lambda s, mask: s + inverse(mask) * -1e9, tf.int32),
    "BERT's": (lambda s, mask: s + (1.0 - tf.ones([S, 1]) * tf.cast(mask, tf.float32)) * -10000.0, tf.int32),
    "lowest": (lambda s, mask: inverse(mask) * tf.float32.min + s, tf.int32),
    "GPT's": (lambda s, mask: s * tf.cast(mask, tf.float32) - tf.constant(1e10) * inverse(mask), tf.int32),
    "scaled behind": (lambda s, mask: (s + inverse(mask) * -1e9) / 4.0, tf.int32),
    "looked up": (lambda s, mask: s + tf.gather(TRIANGLE, tf.cumsum(mask * 0 + 1, axis=-1)[0, 0] - 1), tf.int32),
    "looked up -inf": (
        lambda s, mask: (
            s
            + tf.gather(
                np.where(TRIANGLE < 0, np.float32(-np.inf), TRIANGLE), tf.cumsum(mask * 0 + 1, axis=-1)[0, 0] - 1
            )
        ),
        tf.int32,
    ),
    "a float input": (lambda s, mask: s + mask, tf.float32),
}


@pytest.mark.parametrize("form", FORMS)
def test_masked_attention_keeps_its_accuracy(form):
    masked, dtype = FORMS[form]
    mask = KEPT.astype(dtype.as_numpy_dtype)
    if form == "a float input":
        mask = np.where(KEPT, np.float32(0), np.float32(-1e9))
    sim = simulate(masked, dtype)
    data = dict(zip(sim.graph.inputs, (X, mask), strict=False))
    sim.calibrate(data)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) >= 28


def test_a_learned_bias_keeps_its_grid():
    bias = (np.random.default_rng(2).standard_normal((S, S)) * 4 - 12).astype(np.float32)
    sim = simulate(lambda s, mask: s + v1.get_variable("bias", initializer=bias), tf.bool)
    assert "bias" in sim.plan.quantized
    assert not any(t.mask for t in sim.graph.tensors.values())


def test_masked_classes_are_no_bias():
    @tf.function(input_signature=[tf.TensorSpec([None, D], name="x")])
    def function(x):
        return tf.nn.softmax(tf.matmul(x, W[:, :4]) + np.float32([0, -1e9, 0, -np.inf]))

    sim = QuantSim(function.get_concrete_function())
    data = {sim.graph.inputs[0]: X[:, 0]}
    sim.calibrate(data)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 30
