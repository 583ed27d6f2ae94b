"""What the export of a network takes of memory above the loaded model, as a multiple of its size.

    python benchmarks/export_memory.py --framework keras
    python benchmarks/export_memory.py --framework tensorflow
    python benchmarks/export_memory.py --framework torch
    python benchmarks/export_memory.py --limit 3       # exit status 1 where the export takes more
    python benchmarks/export_memory.py --kept 10       # what Keras simulations leave behind

A residual network of dense layers of random weights, 132 MiB of them, is opened and calibrated, and exported in every
form that its framework has. Everything happens in one process, in which a network of one layer has gone the same way
before, so that the framework's own is in memory when the measurement begins. Counted are private pages (RssAnon,
looked at every 2 ms), above those of the model before it was opened by bitwright and, of the export alone, above those
that were there when it began.

With `--kept N`, MobileNetV2 (Keras, width 0.35, 96 × 96 pixels, random weights) is opened, calibrated with one batch of
8 and let go N times: the same model each time, then another model each time. Printed is the private memory after each,
Python's collector having run, above that after the first, which brings what the framework loads once; and the same of
Keras alone, whose new models are made, run once and let go.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from memory import MIB, Peaks, status


def keras_model(layers: int, width: int) -> Any:
    """The network in Keras."""
    import keras

    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((width,), name="x")
    for _ in range(layers):
        x = keras.layers.Add()([x, keras.layers.Dense(width, activation="relu")(x)])
    return keras.Model(inputs, x)


def tensorflow_model(layers: int, width: int) -> Any:
    """The network as a `tf.Module` with one signature."""
    import tensorflow as tf

    class Network(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            rng = np.random.default_rng(0)
            self.weights = [
                tf.Variable(rng.standard_normal((width, width), np.float32) * np.float32(width**-0.5))
                for _ in range(layers)
            ]

        @tf.function(input_signature=[tf.TensorSpec([None, width], tf.float32, name="x")])
        def __call__(self, x: Any) -> Any:
            for weight in self.weights:
                x = x + tf.nn.relu(tf.matmul(x, weight))
            return x

    return Network()


def torch_model(layers: int, width: int) -> Any:
    """The network in PyTorch."""
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = x + torch.relu(layer(x))
            return x

    torch.manual_seed(0)
    return Network().eval()


def sample_of(framework: str, data: Any) -> Any:
    """What a network is opened with."""
    if framework == "torch":
        import torch

        return torch.from_numpy(data)
    return data if framework == "tensorflow" else None


MODELS = {"keras": keras_model, "tensorflow": tensorflow_model, "torch": torch_model}


def settled() -> int:
    """Private memory, what is free given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("RssAnon")


def run(framework: str, layers: int, width: int, folder: Path) -> float:
    """Open, calibrate and export the network of so many layers; tells the peaks, of each form too.

    Returns:
        The peak of the export as a multiple of the network's size.
    """
    from bitwright import QuantSim

    model = MODELS[framework](layers, width)
    data = np.random.default_rng(1).standard_normal((8, width)).astype(np.float32)
    size = layers * width * width * 4
    loaded = settled()
    peaks = Peaks()
    with peaks.step("calibrate"):
        sim = QuantSim(model, sample_of(framework, data)).calibrate(data)
    begin = settled()
    backend = sim.backend
    write = backend.export

    def one_form(native: Any, plan: Any, table: Any, path: Path, form: str) -> Any:
        starts.append(f"{form} {(status('RssAnon') - loaded) / size:.2f}x")
        with peaks.step(f"  {form}"):
            return write(native, plan, table, path, form)

    starts: list[str] = []
    backend.export = one_form
    try:
        with peaks.step("export"):
            bundle = sim.export(folder)
    finally:
        del backend.export
    print(f"{framework}, {size / MIB:.0f} MiB of weights; the process with the model loaded: {loaded / MIB:.0f} MiB")
    for name, step in peaks.found.items():
        print(f"{name:13} private peak {(step['private'] - loaded) / MIB:6.0f} MiB above it = "
              f"{(step['private'] - loaded) / size:5.2f}x   {step['seconds']:.1f} s")  # fmt: skip
    held = begin - loaded
    print(f"when the export began: {held / MIB:.0f} MiB above the loaded model = {held / size:.2f}x")
    print("when each form began: " + ", ".join(starts))
    print("written: " + ", ".join(f"{key} {path.name}" for key, path in bundle.files.items()))
    return (peaks.found["export"]["private"] - loaded) / size


def mobilenet() -> Any:
    """MobileNetV2 of random weights."""
    import keras

    return keras.applications.MobileNetV2(alpha=0.35, weights=None, input_shape=(96, 96, 3))


def kept(times: int) -> None:
    """Tells what is left in memory of Keras simulations that were let go, after each of them."""
    from bitwright import QuantSim

    data = np.random.default_rng(0).standard_normal((8, 96, 96, 3)).astype(np.float32)
    same = mobilenet()
    ways: dict[str, Callable[[], Any]] = {
        "one model, simulated": lambda: QuantSim(same).calibrate(data),
        "new models, run once": lambda: mobilenet()(data),
        "new models, simulated": lambda: QuantSim(mobilenet()).calibrate(data),
    }
    for name, way in ways.items():
        left = []
        for _ in range(times + 1):
            way()
            gc.collect()
            left.append(status("RssAnon") / MIB)
        later = [value - left[0] for value in left[1:]]
        print(f"{name:22} {', '.join(f'{value:.1f}' for value in later)} MiB: {later[-1] / times:.2f} each", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=list(MODELS), default="keras")
    parser.add_argument("--layers", type=int, default=33)
    parser.add_argument("--width", type=int, default=1024, help="a layer has so many squared weights")
    parser.add_argument("--limit", type=float, help="multiple of the network's size that the export may take")
    parser.add_argument("--kept", type=int, metavar="N", help="only tell what N Keras simulations leave behind")
    args = parser.parse_args()
    if args.kept:
        kept(args.kept)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        run(args.framework, 1, args.width, Path(folder) / "small")
        taken = run(args.framework, args.layers, args.width, Path(folder) / "model")
    return 1 if args.limit is not None and taken > args.limit else 0


if __name__ == "__main__":
    sys.exit(main())
