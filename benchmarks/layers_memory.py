"""What techniques take of memory on networks of more and more small layers: is it the layers, or what is made of them?

    python benchmarks/layers_memory.py
    python benchmarks/layers_memory.py --layers 40 120 240 --techniques adaround gptq

Each network is a chain of 3 × 3 convolutions of 8 channels on 16 × 16 positions (ONNX, 16 samples, one thread), each
run a process of its own, after the same steps with two layers. Printed are MiB of private memory (RssAnon) above what
the process had then: the peak, and what is left when the technique is done; `open` only opens the network.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

TECHNIQUES = ("open", "calibrate", "adaround", "gptq", "seq_mse", "bias_correction", "analyze")


def chain(layers: int):
    """The network."""
    import onnx
    from onnx import helper as h

    rng, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for i in range(layers):
        kernel = rng.normal(size=(8, 8, 3, 3)).astype(np.float32) / 6
        weights += [onnx.numpy_helper.from_array(v, f"{n}{i}") for n, v in (("w", kernel), ("b", kernel[:, 0, 0, 0]))]
        nodes.append(h.make_node("Conv", [x, f"w{i}", f"b{i}"], [f"c{i}"], pads=[1] * 4, kernel_shape=[3, 3]))
        nodes.append(h.make_node("Relu", [f"c{i}"], [x := f"r{i}"]))
    ends = [[h.make_tensor_value_info(n, 1, ["n", 8, 16, 16])] for n in ("x", x)]
    graph = h.make_graph(nodes, "chain", *ends, weights)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)


def private() -> float:
    """MiB that the process has for itself."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise KeyError("RssAnon")


def run(technique: str, layers: int) -> None:
    """One technique on one network, in this process."""
    from bitwright import QuantSim

    data = np.random.default_rng(1).normal(size=(16, 8, 16, 16)).astype(np.float32)

    def taken(model):
        if technique == "analyze":
            from bitwright_analysis.analyzer import quant_analyzer

            return quant_analyzer(model, data, weights="int4")
        sim = QuantSim(model, weights="int4")
        if technique == "open":
            return sim
        return sim.calibrate(data) if technique == "calibrate" else sim.apply(technique, data)

    taken(chain(2))
    model, own, done = chain(layers), private(), threading.Event()
    peak = [own]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    held = taken(model)
    done.set()
    watcher.join()
    print(
        f"{technique:16} {layers:5} layers: peak {peak[0] - own:6.1f} MiB, left {private() - own:6.1f} MiB", flush=True
    )
    del held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[40, 120, 240])
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=list(TECHNIQUES))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run(args.techniques[0], args.layers[0])
    for technique in args.techniques:
        for layers in args.layers:
            words = [sys.executable, __file__, "--child", "--techniques", technique, "--layers", str(layers)]
            subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return None


if __name__ == "__main__":
    main()
