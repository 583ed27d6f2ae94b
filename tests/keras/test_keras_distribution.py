"""Range learning under `tf.distribute.MirroredStrategy`, over two logical CPU devices, in a process of its own."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("keras")

CODE = """
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
from bitwright.errors import InputError
from bitwright.simulation import QuantSim

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
labels = rng.integers(0, 5, 64)
x = (rng.normal(size=(64, 8, 8, 3)) + np.eye(5)[labels][:, None, None, :3]).astype(np.float32)
hidden = inputs = keras.Input((8, 8, 3))
hidden = keras.layers.ReLU(name="relu")(keras.layers.Conv2D(6, 3, use_bias=False, name="conv")(hidden))
hidden = keras.layers.GlobalAveragePooling2D(name="pool")(hidden)
net = keras.Model(inputs, keras.layers.Dense(5, use_bias=False, name="fc")(hidden))
sim = QuantSim(net, weights="int4", activations="uint4", scheme="minmax").calibrate(x)
before = sim.encodings
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope() as strategy:
    model = sim.trainable(range_learning=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss=loss, jit_compile=False)
data = tf.data.Dataset.from_tensor_slices((x, labels)).batch(32)
losses = model.fit(data, epochs=6, verbose=0).history["loss"]
assert losses[-1] < 0.97 * losses[0], losses
assert len(model.trainable_weights) == 10  # kernels, their two scales, four scales and two zero points
for weight in model.weights:
    first, second = (np.asarray(v) for v in weight.value.values)  # of the two replicas
    assert np.array_equal(first, second), weight.path
trained = model.predict(x, verbose=0)
with strategy.scope():  # what was trained is read there too
    try:
        sim.predict(x)
        raise AssertionError("predicts with the weights from before training")
    except InputError as error:
        assert "take()" in str(error), error
sim.take()
assert np.array_equal(sim.model.predict(x, verbose=0), trained)
moved = {s for s in sim.encodings if not sim.encodings[s].equals(before[s])}
assert {"conv/kernel", "fc/kernel", "relu"} <= moved, moved
"""


@pytest.mark.skipif(os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow", reason="TensorFlow's strategies")
def test_mirrored_strategy_trains() -> None:
    pytest.importorskip("tensorflow")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
