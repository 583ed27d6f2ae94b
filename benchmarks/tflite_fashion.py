"""A small CNN on Fashion-MNIST as an int8 .tflite file: the LiteRT interpreter against the simulation.

    apt-get install dataset-fashion-mnist
    python benchmarks/tflite_fashion.py [--train 12000] [--test 2000] [--recipe fold_batch_norm] [--json out.json]

Trains for a minute on one core, calibrates on 256 training images, exports with target tflite-int8, and runs
`verify` with both integer runtimes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import fashion_mnist

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=fashion_mnist.FOLDER)
parser.add_argument("--train", type=int, default=12000)
parser.add_argument("--test", type=int, default=2000)
parser.add_argument("--recipe", default="fold_batch_norm")
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers  # noqa: E402

from bitwright import QuantSim  # noqa: E402
from bitwright.verify import verify  # noqa: E402


def images(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28, 1) in −1…1, and classes."""
    pixels, classes = fashion_mnist.read(arguments.data, part)
    return (pixels[:count, ..., None] / 127.5 - 1).astype(np.float32), classes[:count]


def network() -> keras.Model:
    """Convolutions with batch norms, depthwise ones, a residual sum, a concatenation, a classifier: 95 k weights."""
    x = inputs = keras.Input((28, 28, 1), name="image")

    def block(x, filters, name, **options):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name, **options)(x)
        return layers.ReLU(name=f"{name}_relu")(layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x))

    x = block(x, 24, "stem", strides=2)
    y = block(layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x), 24, "middle")
    x = layers.Add(name="sum")([x, y])
    x = block(x, 48, "wide", strides=2)
    x = layers.Concatenate(name="concat")([x, block(x, 48, "branch")])
    x = block(x, 64, "last")
    x = layers.Flatten(name="flat")(layers.MaxPooling2D(name="pool")(x))
    x = layers.Dense(10, activation="softmax", name="classes")(x)
    return keras.Model(inputs, x, name="fashion")


keras.utils.set_random_seed(0)
x, y = images("train", arguments.train)
x_test, y_test = images("t10k", arguments.test)
model = network()
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x, y, batch_size=64, epochs=2, verbose=0)

sim = QuantSim(model, target="tflite-int8")
for step in filter(None, arguments.recipe.split(",")):
    sim.apply(step, x[:256])
sim.calibrate(x[:256])
with tempfile.TemporaryDirectory() as folder:
    bundle = sim.export(folder, name="fashion")
    sizes = {purpose: path.stat().st_size for purpose, path in bundle.files.items()}
    results: dict[str, object] = {"weights": model.count_params(), "bytes": sizes}
    for runtime in ("tflite", "onnxruntime"):
        found = verify(folder, x_test, y_test, runtime=runtime)
        results[runtime] = {"accuracy": found.accuracy, "agreement": found.agreement, "sqnr_db": found.sqnr_db}
for name, value in results.items():
    print(f"{name}: {value}")
print(f"a .tflite file of {sizes['tflite'] / sizes['pb']:.2f} of the frozen float graph")
if arguments.json:
    arguments.json.write_text(json.dumps(results, indent=1))
