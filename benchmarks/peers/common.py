"""What each peer's program shares: the photos, the network, timing in turns, and the figures as one JSON object.

A program runs in its peer's own environment: this module needs numpy only, and torch where the network is asked for.
ONNX Runtime ignores OMP_NUM_THREADS: every session, those of the peers too, is held to one thread here, since a second
one that waits in a loop would be counted as work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8
"""Images of a float pass, and of each batch that calibrates or evaluates."""


@dataclass
class Bench:
    """One peer's run: what it is given and what it has measured."""

    work: Path
    rounding: int
    """Images for techniques that learn how to round; with 0 they are left out."""
    repeats: int
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calibration = np.load(self.work / "calibration.npy")
        self.evaluation = np.load(self.work / "evaluation.npy")
        self.labels = np.load(self.work / "labels.npy")
        self.onnx = self.work / "lite0.onnx"
        self.begin = resident()

    def batches(self, images: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(images), BATCH):
            yield images[start : start + BATCH]

    def classes(self, run: Callable[[np.ndarray], Any]) -> np.ndarray:
        """The network's class of each photo of the evaluation set."""
        return np.concatenate([np.asarray(run(batch)).argmax(1) for batch in self.batches(self.evaluation)])

    def accuracy(self, name: str, run: Callable[[np.ndarray], Any]) -> None:
        """Top-1 and, from the second call on, the share of photos with the first call's (float's) class; percent."""
        found = self.classes(run)
        self.figures[f"{name} top-1"] = 100 * float((found == self.labels).mean())
        if hasattr(self, "float_classes"):
            self.figures[f"{name} agreement"] = 100 * float((found == self.float_classes).mean())
        else:
            self.float_classes = found
        log(f"{name}: {self.figures[f'{name} top-1']:.1f}")

    def seconds(self, name: str, action: Callable[[], Any]) -> Any:
        """What `action` gives; the CPU seconds that it took, all threads of the process, are kept."""
        begin = time.process_time()
        given = action()
        self.figures[f"{name} s"] = time.process_time() - begin
        log(f"{name}: {self.figures[f'{name} s']:.1f} s")
        return given

    def turns(self, tasks: dict[str, Callable[[], Any]]) -> None:
        """Median CPU seconds of each task; they take turns, so that all of them see the same machine."""
        for task in tasks.values():
            task()
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(self.repeats):
            for name, task in tasks.items():
                begin = time.process_time()
                task()
                times[name].append(time.process_time() - begin)
        self.figures |= {f"{name} s": statistics.median(taken) for name, taken in times.items()}

    def artefact(self, path: Path) -> None:
        """Top-1 of a written ONNX file in a plain session of ONNX Runtime, as its users open it."""
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        single = entry.shape[0] == 1  # some exporters freeze the batch

        def run(batch: np.ndarray) -> np.ndarray:
            parts = [batch[i : i + 1] for i in range(len(batch))] if single else [batch]
            return np.concatenate([session.run(None, {entry.name: part})[0] for part in parts])

        self.accuracy("runtime", run)

    def end(self, *packages: str) -> None:
        """Print the figures, with the versions of `packages` and the memory that the run took above its start."""
        self.figures["memory MiB"] = max(0.0, peak() - self.begin)
        self.figures["versions"] = {name: importlib.metadata.version(name) for name in packages}
        print("FIGURES " + json.dumps(self.figures), flush=True)


def bench() -> Bench:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounding", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    hold_to_one_thread()
    return Bench(**vars(parser.parse_args()))


def hold_to_one_thread() -> None:
    """Make every session of ONNX Runtime from now on, whoever opens it, compute on one thread."""
    try:
        from onnxruntime import InferenceSession, SessionOptions
    except ModuleNotFoundError:
        return
    opened = InferenceSession.__init__

    def held(self: Any, path_or_bytes: Any, sess_options: Any = None, *others: Any, **named: Any) -> None:
        options = sess_options or SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        opened(self, path_or_bytes, options, *others, **named)

    InferenceSession.__init__ = held


def network() -> Any:
    """EfficientNet-Lite0 with its ImageNet weights, a torch module in eval mode with its batch norms."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from efficientnet_lite0 import build

    torch.set_num_threads(1)
    net = build()
    for kind in {type(module) for module in net.modules()}:
        if "<locals>" in kind.__qualname__:  # so that peers can pickle the network
            kind.__qualname__ = kind.__name__
            setattr(sys.modules[kind.__module__], kind.__name__, kind)
    return net


def evaluate(module: Any) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    def run(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = module(torch.from_numpy(batch)).numpy()
            return found

    return run


def training_step(module: Any, bench: Bench) -> Callable[[], None]:
    """Forward, backward and an update of SGD on one batch; batch norms keep their statistics, as all peers' do."""
    import torch

    images = torch.from_numpy(bench.calibration[:BATCH])
    truth = torch.from_numpy(bench.labels[:BATCH])
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1e-6)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images), truth).backward()
        optimizer.step()

    return step


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def resident() -> float:
    """MiB of this process that lie in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak() -> float:
    """MiB at the process's highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
