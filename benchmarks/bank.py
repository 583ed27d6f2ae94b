"""A bank of EfficientNet-Lite0: its size, what collecting costs, and whether its codes are those of data.

    python benchmarks/efficientnet_lite0.py lite0.onnx
    python benchmarks/bank.py lite0.onnx --images imagenet.tar [--samples 250] [--technique gptq] [--thin 16]
    python benchmarks/bank.py lite0.onnx --images imagenet.tar --accuracy [--skip 250]   # of W4 on the other photos
    python benchmarks/bank.py --backend keras --images imagenet.tar --samples 50   # torch, keras or tensorflow: codes

Prints the float pass, one calibration (sqnr) and the collection over the same photos, in seconds and float passes; the
page faults of collecting; the bank's bytes; the weight codes that differ between a bank (float32, float64, thin) and
the data with `inputs: float` and the same positions; and the seconds that six solutions take from one bank (W4, W6, W8,
per channel and in blocks of 32), beside one on data. With `--accuracy` instead: top-1 and the KL divergence from the
float network, of W4 solved on banks of all and of some positions, on the photos that they were not collected from.
Seconds are of all threads together (CPU time), which other work on the machine hardly lengthens; where it says so, they
are by the clock, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import resource
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


def clocked(what: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, its CPU time, and the time by the clock."""
    begin = time.perf_counter()
    found, seconds = timed(what)
    return found, seconds, time.perf_counter() - begin


def page_faults() -> int:
    """Of this process so far: of memory that is touched for the first time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


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


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def accuracy(sim: QuantSim, technique: str, thin: int, chosen: slice, images: np.ndarray, labels: np.ndarray) -> None:
    """Print top-1 and divergence on the photos that banks of the others lead to."""
    rest = np.ones(len(images), bool)
    rest[chosen] = False
    name = sim.graph.inputs[0]
    data = [{name: part} for part in np.array_split(images[rest], max(1, rest.sum() // 10))]

    def logits(run: Callable[[Any], Any]) -> np.ndarray:
        return np.concatenate([np.asarray(next(iter(run(batch).values()))) for batch in data])

    tap = [Tap(sim.graph.outputs[0])]
    plain = logits(sim.backend.session(sim.native, tap).run)
    top1 = lambda found: (found.argmax(axis=1) == labels[rest]).mean()
    print(f"float: top-1 {top1(plain):.3f} of {rest.sum()} photos", flush=True)
    for value in (None, thin):
        with tempfile.TemporaryDirectory() as folder:
            bank = collect(sim, images[chosen], Path(folder) / "bank", thin=value)
            solved = sim.fork().apply(technique, bank).calibrate(bank)
        found = logits(solved.simulation.session(tap).run)
        p, q = log_softmax(plain.astype(np.float64)), log_softmax(found.astype(np.float64))
        divergence = (np.exp(p) * (p - q)).sum(axis=1).mean()
        print(f"thin {value}: top-1 {top1(found):.3f}, KL divergence {divergence:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--backend", choices=("onnx", "torch", "keras", "tensorflow"), default="onnx")
    parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
    parser.add_argument("--samples", type=int, default=250)
    parser.add_argument("--technique", default="gptq", help="gptq, adaround or seq_mse")
    parser.add_argument("--thin", type=int, default=16, help="features of a layer for each position that counts")
    parser.add_argument(
        "--banks", nargs="+", choices=("float32", "float64", "thin"), default=("float32", "float64", "thin")
    )
    parser.add_argument("--once", action="store_true", help="leave out the six solutions from one bank")
    parser.add_argument("--accuracy", action="store_true", help="of solutions on banks, and nothing else")
    parser.add_argument("--skip", type=int, default=0, help="photos before the first one that is collected from")
    args = parser.parse_args()
    every, labels = photos(args.images)
    chosen = slice(args.skip, args.skip + args.samples)
    images = every[chosen]
    if args.backend in ("keras", "tensorflow"):
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    made, sample = model_of(args.backend, args.model, images)

    def opened(weights: str = "int4") -> QuantSim:
        return QuantSim(made, sample, weights=weights, backend=args.backend).apply("fold_batch_norm")

    sim = opened()
    if args.accuracy:
        accuracy(sim, args.technique, args.thin, chosen, every, labels)
        return
    data = sim.open(images)
    session = sim.backend.session(sim.native, [Tap(t) for t in sim.graph.outputs])
    _, one = timed(lambda: [session.run(batch) for batch in data])
    print(f"float pass over {len(images)} photos: {one:.1f} s", flush=True)
    _, seconds = timed(lambda: sim.fork().calibrate(data))
    print(f"calibration (sqnr): {seconds / one:.2f} float passes", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        banks, on_data = {}, {}
        kinds = {"float32": {}, "float64": {"number": "float64"}, "thin": {"thin": args.thin}}
        kinds = {kind: kinds[kind] for kind in args.banks}
        for kind, given in kinds.items():
            before = page_faults()
            banks[kind], seconds, clock = clocked(lambda k=kind, g=given: collect(sim, data, Path(folder) / k, **g))
            taken = page_faults() - before
            _, again, clock_again = clocked(lambda: [session.run(batch) for batch in data])
            print(
                f"collecting, {kind}: {seconds / one:.2f} float passes ({seconds / again:.2f} of one right after it), "
                f"by the clock {clock:.1f} s or {clock / clock_again:.2f}, {taken} page faults, "
                f"{banks[kind].bytes / 1e6:.1f} MB",
                flush=True,
            )
        for thin in {given.get("thin") for given in kinds.values()}:
            on_data[thin], seconds = timed(
                lambda t=thin: sim.fork().apply(args.technique, data, inputs="float", thin=t)
            )
            print(f"{args.technique} on data, inputs: float, thin {thin}: {seconds / one:.2f} float passes", flush=True)
        for kind, bank in banks.items():
            solved, seconds = timed(lambda b=bank: sim.fork().apply(args.technique, b, inputs="float"))
            print(
                f"{args.technique} on the {kind} bank: {seconds / one:.2f} float passes; codes that differ: "
                f"{differing(solved, on_data[kinds[kind].get('thin')])}",
                flush=True,
            )
        total = 0.0
        for weights in TYPES if args.backend == "onnx" and not args.once else ():
            _, seconds = timed(
                lambda w=weights: (
                    opened(w).apply(args.technique, banks[args.banks[-1]]).calibrate(banks[args.banks[-1]])
                )
            )
            total += seconds
            print(f"{weights}: {seconds:.1f} s", flush=True)
        if total:
            print(f"all six from one bank: {total / one:.2f} float passes")


if __name__ == "__main__":
    main()
