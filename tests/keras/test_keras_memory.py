"""Simulations that are made again and again leave nothing behind."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras runs on another framework here", allow_module_level=True)

from keras import layers as L  # noqa: E402
from tensorflow.python.framework.func_graph import FuncGraph  # noqa: E402

from bitwright import QuantSim  # noqa: E402


def _graphs() -> int:
    gc.collect()
    return sum(issubclass(type(o), FuncGraph) for o in gc.get_objects())


@pytest.mark.parametrize("activations", ["uint8", "float16"])
def test_traced_graphs_go_with_their_simulation(activations: str) -> None:
    inputs = keras.Input((16,))
    model = keras.Model(inputs, L.Dense(4)(L.Dense(8, activation="relu")(inputs)))
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)

    def used() -> Any:
        sim = QuantSim(model, activations=activations).calibrate(x)
        return sim.predict(x)[0]

    used()
    before = _graphs()
    for _ in range(3):
        used()
    assert _graphs() == before


@pytest.mark.parametrize("how", ["predict", "training"])
def test_traced_graphs_go_with_the_model_that_was_run(how: str) -> None:
    """The native model, by Keras's own `predict` and in a training loop of one's own."""
    import tensorflow as tf

    inputs = keras.Input((16,))
    model = keras.Model(inputs, L.Dense(4)(L.Dense(8, activation="relu")(inputs)))
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)

    def used() -> None:
        sim = QuantSim(model).calibrate(x)
        if how == "predict":
            sim.model.predict(x, verbose=0)
            return
        trained = sim.trainable(range_learning=True)

        @tf.function
        def step(batch: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(trained(batch, training=True) ** 2)
            gradients = tape.gradient(loss, trained.trainable_variables)
            for variable, gradient in zip(trained.trainable_variables, gradients, strict=True):
                variable.assign_sub(0.01 * gradient)
            return loss

        assert float(step(tf.constant(x))) > float(step(tf.constant(x)))
        sim.take()

    used()
    before = _graphs()
    for _ in range(2):
        used()
    assert _graphs() == before


def test_what_a_session_computes_is_what_the_trainable_model_computes() -> None:
    """Sessions are traced without gradients, the model with them."""
    inputs = keras.Input((16,))
    model = keras.Model(inputs, L.Dense(4)(L.Dense(8, activation="relu")(inputs)))
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    sim = QuantSim(model).calibrate(x)
    assert np.array_equal(sim.predict(x)[0], np.asarray(sim.model(x)))
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(sim.model(x) ** 2)
    assert all(np.abs(np.asarray(g)).sum() > 0 for g in tape.gradient(loss, sim.model.trainable_variables))
