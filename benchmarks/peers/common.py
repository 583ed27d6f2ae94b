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
import traceback
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
    iterations: int
    """Steps a layer to estimate from what techniques take that would take hours at their defaults; 0: run these."""
    repeats: int
    passes: bool
    """Whether the passes and steps alone are measured, which want a machine to themselves."""
    seconds_alone: bool
    """Whether calibration and export alone are timed, which are also shorter on a machine that does nothing else."""
    techniques: str
    """Techniques for 4-bit weights that alone are run, beginnings of names with commas between; empty: everything."""
    packages: tuple[str, ...]
    """Those whose versions belong to the figures."""
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calibration = np.load(self.work / "calibration.npy")
        self.evaluation = np.load(self.work / "evaluation.npy")
        self.labels = np.load(self.work / "labels.npy")
        if self.passes:  # ranges take little of a pass's time; two batches are enough for any
            self.calibration, self.rounding = self.calibration[: 2 * BATCH], 0
        if self.seconds_alone:
            self.rounding = 0
        self.few = self.calibration[: self.rounding]
        self.onnx, self.keras, self.tflite = (self.work / f"lite0.{kind}" for kind in ("onnx", "keras", "tflite"))
        self.begin = resident()
        self.figures["versions"] = {name: importlib.metadata.version(name) for name in self.packages}

    def batches(self, images: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(images), BATCH):
            yield images[start : start + BATCH]

    def classes(self, run: Callable[[np.ndarray], Any]) -> np.ndarray:
        """The network's class of each photo of the evaluation set."""
        return np.concatenate([np.asarray(run(batch)).argmax(1) for batch in self.batches(self.evaluation)])

    def accuracy(self, name: str, run: Callable[[np.ndarray], Any]) -> None:
        """Top-1 and, from the second call on, the share of photos with the first call's (float's) class; percent."""
        if self.techniques and not name.startswith("W4A8 "):
            return
        self.doing(name)
        if self.seconds_alone:
            if name == "float":  # as in a whole run, what calibrates isn't the process's first pass
                run(self.evaluation[:BATCH])
            return
        found = self.classes(run)
        if self.passes:  # the photos have warmed the model up: bitwright compiles its kernels once they pay
            return
        self.figures[f"{name} top-1"] = 100 * float((found == self.labels).mean())
        if hasattr(self, "float_classes"):
            self.figures[f"{name} agreement"] = 100 * float((found == self.float_classes).mean())
        else:
            self.float_classes = found
        log(f"{name}: {self.figures[f'{name} top-1']:.1f}")

    def seconds(self, name: str, action: Callable[[], Any]) -> Any:
        """What `action` gives; the CPU seconds that it took, all threads of the process, are kept, and the most memory
        that the process held meanwhile, above what it held at its start."""
        self.doing(name)
        before = gauge()
        forget_peak()
        begin = time.process_time()
        given = action()
        self.figures[f"{name} s"] = time.process_time() - begin
        self.figures[f"{name} MiB"] = peak() - self.begin
        self.figures.setdefault("gauge", []).extend((before, gauge()))
        log(f"{name}: {self.figures[f'{name} s']:.1f} s, {self.figures[f'{name} MiB']:.0f} MiB")
        return given

    def attempt(self, name: str, action: Callable[[], Any]) -> None:
        """Run what a peer may be unable to do: the error's first line is a figure then, not the end of the run."""
        if self.passes or (self.seconds_alone and name != "export"):
            return
        if self.techniques and not name.startswith(tuple(self.techniques.split(","))):
            return
        self.doing(name)
        try:
            action()
        except Exception as e:
            self.figures[f"{name} failed"] = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
            log(traceback.format_exc())

    def export(
        self,
        write: Callable[[], Path],
        opened: Callable[[Path], Callable[[np.ndarray], np.ndarray]] | None = None,
    ) -> None:
        """Time what writes a file, and run it: by what `opened` makes of it; without, an ONNX file in ONNX Runtime."""

        def run() -> None:
            path = self.seconds("export", write)
            if opened and not self.seconds_alone:
                self.accuracy("runtime", opened(path))
            else:
                self.artefact(path)

        self.attempt("export", run)

    def rounded(
        self, name: str, solve: Callable[[], Any], opened: Callable[[Any], Callable[[np.ndarray], Any]]
    ) -> None:
        """Time a technique for 4-bit weights, and take the accuracy of what `opened` makes of its result."""
        if self.rounding:
            self.attempt(name, lambda: self.accuracy(f"W4A8 {name}", opened(self.seconds(name, solve))))

    def rehearsed(self, name: str, default: int, steps: int, solve: Callable[[Callable[[], None]], Any]) -> None:
        """Estimate the CPU seconds of a technique at its `default` steps (a layer) from a run of `steps` of them.

        `solve` calls what it is given once in each step. What lies between two steps of a layer is multiplied, all
        else counts once.
        """
        if not self.rounding:
            return
        marks: list[float] = []

        def run() -> None:
            before, begin = gauge(), time.process_time()
            solve(lambda: marks.append(time.process_time()))
            taken = time.process_time() - begin
            layers, left = divmod(len(marks), steps)
            if left or not layers:
                raise RuntimeError(f"{len(marks)} steps are no whole number of layers of {steps}")
            stepped = float(np.diff(np.reshape(marks, (layers, steps))).sum())
            whole = taken - stepped + stepped * (default - 1) / (steps - 1)
            self.figures |= {f"{name} {default} s, estimated": whole, f"{name} {default} steps timed": steps}
            self.figures.setdefault("gauge", []).extend((before, gauge()))
            log(f"{name}: {taken:.0f} s with {steps} steps, {whole:.0f} s with {default}")

        self.attempt(name, run)

    def turns(self, tasks: dict[str, Callable[[], Any]]) -> None:
        """Median CPU seconds of each task; they take turns, so that all of them see the same machine."""
        if self.techniques or self.seconds_alone:
            return
        self.doing(" and ".join(tasks))
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
        """Top-1 of a written ONNX file in a plain session of ONNX Runtime, as its users open it; where its weights are
        in float, also in a session that leaves them so."""
        if self.seconds_alone:
            return
        self.accuracy("runtime", self.session(path))
        if float_weights(path):
            self.accuracy("runtime, float weights", self.session(path, "WeightBiasQuantization"))

    def session(self, path: Path, *without: str) -> Callable[[np.ndarray], np.ndarray]:
        """What runs an ONNX file, `without` these optimizers of ONNX Runtime."""
        import onnxruntime

        session = onnxruntime.InferenceSession(
            path, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
        )
        entry = session.get_inputs()[0]
        single = entry.shape[0] == 1  # some exporters freeze the batch

        def run(batch: np.ndarray) -> np.ndarray:
            parts = [batch[i : i + 1] for i in range(len(batch))] if single else [batch]
            return np.concatenate([session.run(None, {entry.name: part})[0] for part in parts])

        return run

    def doing(self, name: str) -> None:
        """Print the figures so far, and what comes next: what a run that is cut off has measured counts."""
        print("FIGURES " + json.dumps(self.figures | {"doing": name}), flush=True)

    def end(self) -> None:
        """Print the figures."""
        print("FIGURES " + json.dumps(self.figures), flush=True)


def bench(*packages: str) -> Bench:
    """The run that the command line asks for; figures come with the versions of `packages`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounding", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--passes", action="store_true")
    parser.add_argument("--seconds", action="store_true", dest="seconds_alone")
    parser.add_argument("--techniques", default="")
    hold_to_one_thread()
    return Bench(**vars(parser.parse_args()), packages=packages)


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


def channels_last(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) → (N, H, W, C)."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def litert(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """What runs a .tflite file in LiteRT's interpreter on one thread, one photo after the other."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    entry, output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def codes(values: np.ndarray) -> np.ndarray:
        if entry["dtype"] is np.float32:
            return values
        scale, zero = entry["quantization"]
        limits = np.iinfo(entry["dtype"])
        return np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(entry["dtype"])

    def run(batch: np.ndarray) -> np.ndarray:
        """Codes of the output rise with its values: the class is the same."""
        found = []
        for image in channels_last(batch):
            interpreter.set_tensor(entry["index"], codes(image[None]))
            interpreter.invoke()
            found.append(interpreter.get_tensor(output["index"])[0])
        return np.stack(found)

    return run


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


def let_torchvision_load() -> None:
    """Declare two operators of torchvision, which peers import and don't call.

    PyPI's torchvision is built for CUDA. Beside a torch for CPUs its library can't be loaded, and its import fails
    where it describes operators of it.
    """
    import torch

    if torch.version.cuda is None and "+cpu" not in importlib.metadata.version("torchvision"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


KEPT: list[Any] = []
"""Libraries of operators: a declaration lasts as long as its object."""


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


def gauge() -> float:
    """CPU seconds of work that is always the same: what else the machine does stretches them too, by shared caches,
    memory and cores."""
    square, long = np.ones((384, 384), np.float32), np.ones(4 << 20, np.float32)
    times = []
    for _ in range(5):
        begin = time.process_time()
        for _ in range(3):
            square @ square
            long.copy()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def float_weights(path: Path) -> bool:
    """Whether convolutions of an ONNX file read weights in float.

    ONNX Runtime rounds those to 8 bits itself, with one scale for the tensor, wherever it finds quantized inputs and
    outputs (its optimizer `WeightBiasQuantization`).
    """
    import onnx

    graph = onnx.load(path).graph
    held = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    quantizes = any(node.op_type == "QuantizeLinear" for node in graph.node)
    return quantizes and any(node.op_type == "Conv" and node.input[1] in held for node in graph.node)


def resident() -> float:
    """MiB of this process that lie in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def forget_peak() -> None:
    """Let `peak` count from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """MiB of this process at its highest since the last `forget_peak`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))
