"""bitwright in Keras: target `tflite-int8` (int8 per channel, int8 activations), whose file runs in LiteRT; W4A8 by two
techniques."""

from __future__ import annotations

import os

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from common import BATCH, bench, channels_last, litert

from bitwright.simulation import QuantSim

run = bench("bitwright", "tensorflow-cpu", "keras", "ai-edge-litert")
model = keras.saving.load_model(run.keras, compile=False)
data, few = channels_last(run.calibration), channels_last(run.few)


def evaluate(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    function = tf.function(lambda images: model(images, training=False))
    return lambda batch: function(tf.constant(channels_last(batch))).numpy()


def step(model: Any) -> Callable[[], Any]:
    """As the others': forward, backward and an update of SGD on one batch."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-6), loss=loss)
    return lambda: model.train_on_batch(data[:BATCH], run.labels[:BATCH])


run.accuracy("float", evaluate(model))
sim = run.seconds("calibrate", lambda: QuantSim(model, target="tflite-int8").apply("fold_batch_norm").calibrate(data))
simulated = evaluate(sim.model)
run.accuracy("W8A8", simulated)
run.export(lambda: sim.export(run.work / "bitwright_keras").files["tflite"], litert)
plain = evaluate(model)
first = run.calibration[:BATCH]
run.turns({"float pass": lambda: plain(first), "simulated pass": lambda: simulated(first)})
float_model = keras.saving.load_model(run.keras, compile=False)
run.turns({"float step": step(float_model), "training step": step(sim.trainable())})
for technique in ("adaround", "gptq"):
    run.rounded(
        technique,
        lambda technique=technique: QuantSim(model, weights="int4").apply("fold_batch_norm").apply(technique, few),
        lambda low: evaluate(low.calibrate(data).model),
    )
run.end()
