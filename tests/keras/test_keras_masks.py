"""Attention masks in Keras models: whatever the form, masked scores don't set the grid of the others."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

from keras import layers as L  # noqa: E402
from keras import ops  # noqa: E402

from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import sqnr  # noqa: E402

S, D, N = 12, 16, 24
KEPT = np.tile(np.arange(S) < 8, (N, 1, 1))
X = np.random.default_rng(0).standard_normal((N, S, D)).astype(np.float32)
TRIANGLE = np.triu(np.full((S, S), -1e4, np.float32), 1)


def attention(masked, dtype):
    keras.utils.set_random_seed(1)
    q, mask = L.Input((S, D), name="q"), L.Input((1, S), name="mask", dtype=dtype)
    k = L.Dense(D, name="k")(q)
    scores = ops.matmul(q, ops.transpose(k, (0, 2, 1))) * D**-0.5
    weights = masked(scores, mask)
    return keras.Model([q, mask], ops.matmul(weights, k))


def softmax(scores):
    return ops.softmax(scores, -1)


FORMS = {
    "triangle": (lambda s, mask: softmax(s + TRIANGLE), "bool"),
    "triangle of -inf": (lambda s, mask: softmax(s + np.where(TRIANGLE < 0, np.float32(-np.inf), TRIANGLE)), "bool"),
    "where": (lambda s, mask: softmax(ops.where(mask, s, -1e9)), "bool"),
    "-1e9": (lambda s, mask: softmax(s + (1.0 - ops.cast(mask, "float32")) * -1e9), "int32"),
    "on the left": (lambda s, mask: softmax(-1e4 * (1.0 - ops.cast(mask, "float32")) + s), "int32"),
    "subtracted": (lambda s, mask: softmax(L.Subtract()([s, (1.0 - mask) * 1e4 + ops.zeros_like(s)])), "float32"),
    "scaled behind": (lambda s, mask: softmax(ops.where(mask, s, -1e9) / 4.0), "bool"),
    "softmax layer": (lambda s, mask: L.Softmax()(s, mask=ops.logical_and(mask, ops.ones_like(s, "bool"))), "bool"),
    "logarithm": (lambda s, mask: softmax(s + ops.log(mask)), "float32"),
    "looked up": (lambda s, mask: softmax(s + ops.take(TRIANGLE, ops.cumsum(mask * 0 + 1, -1)[:, 0] - 1, 0)), "int32"),
    "a float input": (lambda s, mask: softmax(s + mask), "float32"),
}


@pytest.mark.parametrize("form", FORMS)
def test_masked_attention_keeps_its_accuracy(form):
    masked, dtype = FORMS[form]
    mask = KEPT.astype(dtype) if form != "a float input" else np.where(KEPT, np.float32(0), np.float32(-1e9))
    data = {"q": X, "mask": mask}
    sim = QuantSim(attention(masked, dtype)).calibrate(data)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) >= 28


@pytest.mark.parametrize("target", ["default", "htp_v73"])
def test_multi_head_attention_with_masks(target, tmp_path):
    keras.utils.set_random_seed(1)
    q, mask = L.Input((S, D), name="q"), L.Input((1, S), name="mask", dtype="bool")
    y = L.MultiHeadAttention(2, 8, name="mha")(q, q, attention_mask=mask, use_causal_mask=True)
    data = {"q": X, "mask": KEPT}
    sim = QuantSim(keras.Model([q, mask], y), target=target).calibrate(data)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) >= 28
    assert "mha/masked" not in sim.plan.quantized
    assert "mha/scores" in sim.plan.quantized


def test_a_learned_bias_keeps_its_grid():
    bias = (np.random.default_rng(2).standard_normal((S, S)) * 4 - 12).astype(np.float32)
    sim = QuantSim(attention(lambda s, mask: softmax(s + bias), "bool"))
    assert not any(t.mask for t in sim.graph.tensors.values())


def test_masked_classes_are_no_bias():
    x = L.Input((8,), name="x")
    h = L.Dense(4, use_bias=False, name="h")(x)
    model = keras.Model(x, ops.softmax(h + np.float32([0, -1e9, 0, -np.inf])))
    data = np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32)
    sim = QuantSim(model).calibrate(data)
    assert sqnr(sim.predict(data, simulated=False)[0], sim.predict(data)[0]) > 30
