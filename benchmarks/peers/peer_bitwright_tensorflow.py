"""bitwright in TensorFlow: a function, target `onnxruntime-cpu`; W4A8 by two techniques."""

from __future__ import annotations

import os

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
os.environ |= dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")

import keras
import tensorflow as tf
from common import BATCH, bench, channels_last

from bitwright.simulation import QuantSim

run = bench("bitwright", "tensorflow-cpu", "onnxruntime")
model = keras.models.load_model(run.keras)
photos, few = channels_last(run.calibration), channels_last(run.few)
sample = photos[:BATCH]


@tf.function(input_signature=[tf.TensorSpec((None, *photos.shape[1:]), tf.float32, name="image")])
def classify(image):
    return model(image, training=False)


def evaluate(function):
    return lambda batch: function(tf.constant(channels_last(batch))).numpy()


plain = evaluate(classify)
run.accuracy("float", plain)


def calibrated() -> QuantSim:
    return QuantSim(classify, sample, target="onnxruntime-cpu").apply("fold_batch_norm").calibrate(photos)


sim = run.seconds("calibrate", calibrated)
simulated = evaluate(sim.model.function)
run.accuracy("W8A8", simulated)


def opened(path):
    through = run.session(path)
    return lambda batch: through(channels_last(batch))


run.export(lambda: sim.export(run.work / "bitwright_tensorflow").files["qdq"], opened)
first = run.calibration[:BATCH]
run.turns({"float pass": lambda: plain(first), "simulated pass": lambda: simulated(first)})


def training_step(function):
    """As in PyTorch: an update of gradient descent on one batch, batch norms keep their statistics."""
    images, truth = tf.constant(sample), tf.constant(run.labels[:BATCH])
    variables = function.trainable_variables

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(truth, function(images)))
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            if gradient is not None:
                variable.assign_sub(1e-6 * gradient)
        return loss

    return lambda: step().numpy()


class Whole(tf.Module):
    """The float network in inference form, trained as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.network = keras.models.load_model(run.keras)

    def __call__(self, image):
        return self.network(image, training=False)

    @property
    def trainable_variables(self):
        return [variable.value for variable in self.network.trainable_variables]


run.turns({"float step": training_step(Whole()), "training step": training_step(sim.trainable().function)})
for technique in ("adaround", "gptq"):
    run.rounded(
        technique,
        lambda technique=technique: (
            QuantSim(classify, sample, weights="int4").apply("fold_batch_norm").apply(technique, few)
        ),
        lambda low: evaluate(low.calibrate(photos).model.function),
    )
run.end()
