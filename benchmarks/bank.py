"""A bank of EfficientNet-Lite0: its size, what collecting costs, and whether its codes are those of data.

    python benchmarks/efficientnet_lite0.py lite0.onnx
    python benchmarks/bank.py lite0.onnx --images imagenet.tar [--samples 250] [--technique gptq]
    python benchmarks/bank.py --backend keras --images imagenet.tar --samples 50   # torch, keras or tensorflow: codes

Prints the float pass, one calibration (sqnr) and the collection over the same photos, in seconds and float passes; the
bank's bytes; the weight codes that differ between a bank (float32, float64) and the data with `inputs: float`; and the
seconds that six solutions take from one bank (W4, W6, W8, per channel and in blocks of 32), beside one on the data.
Seconds are of all threads together (CPU time), which other work on the machine doesn't lengthen.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from imagenet import photos

from bitwright.backend import Tap
from bitwright.bank import collect
from bitwright.simulation import QuantSim

TYPES = [f"int{bits}{blocks}" for bits in (4, 6, 8) for blocks in ("", ":block32")]


def timed(what: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    return what(), time.process_time() - begin


def codes(sim: QuantSim) -> list[np.ndarray]:
    weights = [op.weight for op in sim.graph.linear_ops]
    return [sim.encodings[w].quantize(sim.params[w]) for w in weights if w in sim.encodings]


def differing(one: QuantSim, other: QuantSim) -> str:
    pairs = list(zip(codes(one), codes(other), strict=True))
    return f"{sum(int((a != b).sum()) for a, b in pairs)} of {sum(a.size for a, _ in pairs)}"


def model_of(backend: str, path: str | None, images: np.ndarray) -> tuple[Any, Any]:
    """Lite0 as a framework has it, of the same weights, and the sample that it is traced with."""
    if backend == "onnx":
        return path, None
    from efficientnet_lite0 import build
    from lite0_frameworks import keras_model, tensorflow_session

    module = build()
    if backend == "torch":
        import torch

        return module, torch.from_numpy(images[:2])
    if backend == "keras":
        return keras_model(module), None
    from bitwright_tensorflow import SessionModel

    session, entry, output = tensorflow_session(module)
    return SessionModel(session, inputs=[entry], outputs=[output]), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--backend", choices=("onnx", "torch", "keras", "tensorflow"), default="onnx")
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--technique", default="gptq", help="gptq, adaround or seq_mse")
    args = parser.parse_args()
    images = photos(args.images)[0][: args.samples]
    if args.backend in ("keras", "tensorflow"):
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    made, sample = model_of(args.backend, args.model, images)

    def opened(weights: str = "int4") -> QuantSim:
        return QuantSim(made, sample, weights=weights, backend=args.backend).apply("fold_batch_norm")

    sim = opened()
    data = sim.open(images)
    session = sim.backend.session(sim.native, [Tap(t) for t in sim.graph.outputs])
    _, one = timed(lambda: [session.run(batch) for batch in data])
    print(f"float pass over {len(images)} photos: {one:.1f} s", flush=True)
    _, seconds = timed(lambda: sim.fork().calibrate(data))
    print(f"calibration (sqnr): {seconds / one:.2f} float passes", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        banks = {}
        for number in ("float32", "float64"):
            banks[number], seconds = timed(lambda n=number: collect(sim, data, Path(folder) / n, number=n))
            print(
                f"collecting, {number}: {seconds / one:.2f} float passes, {banks[number].bytes / 1e6:.1f} MB",
                flush=True,
            )
        on_data, seconds = timed(lambda: sim.fork().apply(args.technique, data, inputs="float"))
        print(f"{args.technique} on data, inputs: float: {seconds / one:.2f} float passes", flush=True)
        for number, bank in banks.items():
            solved, seconds = timed(lambda b=bank: sim.fork().apply(args.technique, b, inputs="float"))
            print(
                f"{args.technique} on the {number} bank: {seconds / one:.2f} float passes; codes that differ: "
                f"{differing(solved, on_data)}",
                flush=True,
            )
        total = 0.0
        for weights in TYPES if args.backend == "onnx" else ():
            _, seconds = timed(
                lambda w=weights: opened(w).apply(args.technique, banks["float32"]).calibrate(banks["float32"])
            )
            total += seconds
            print(f"{weights}: {seconds:.1f} s", flush=True)
        if total:
            print(f"all six from one bank: {total / one:.2f} float passes")


if __name__ == "__main__":
    main()
