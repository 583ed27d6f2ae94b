"""bitwright in Keras: target `tflite-int8`, whose .tflite file runs in LiteRT; W4A8 by two techniques."""

from __future__ import annotations

import os

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
os.environ |= dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")

import keras
import tensorflow as tf
from common import BATCH, bench, channels_last, litert

from bitwright.simulation import QuantSim

run = bench("bitwright", "keras", "tensorflow-cpu", "ai-edge-litert")
model = keras.models.load_model(run.keras)
photos, few = channels_last(run.calibration), channels_last(run.few)


def evaluate(network):
    """A pass of the network as a function that TensorFlow compiles."""
    compiled = tf.function(lambda images: network(images, training=False))
    return lambda batch: compiled(tf.constant(channels_last(batch))).numpy()


plain = evaluate(model)
run.accuracy("float", plain)


def calibrated() -> QuantSim:
    return QuantSim(model, target="tflite-int8").apply("fold_batch_norm").calibrate(photos)


sim = run.seconds("calibrate", calibrated)
simulated = evaluate(sim.model)
run.accuracy("W8A8", simulated)
run.export(lambda: sim.export(run.work / "bitwright_keras").files["tflite"], litert)
first = run.calibration[:BATCH]
run.turns({"float pass": lambda: plain(first), "simulated pass": lambda: simulated(first)})


def training_step(network):
    """As in PyTorch: an update of SGD on one batch, batch norms keep their statistics."""
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.SGD(1e-6), loss=loss, jit_compile=False)
    images, truth = photos[:BATCH], run.labels[:BATCH]
    return lambda: network.train_on_batch(images, truth)


floating = keras.models.load_model(run.keras)
run.turns({"float step": training_step(floating), "training step": training_step(sim.trainable())})
for technique in ("adaround", "gptq"):
    run.rounded(
        technique,
        lambda technique=technique: QuantSim(model, weights="int4").apply("fold_batch_norm").apply(technique, few),
        lambda low: evaluate(low.calibrate(photos).model),
    )
run.end()
