"""What each step of a run takes of memory, as a multiple of the model's size; and whether all fit under a limit.

    python benchmarks/memory.py                                # 256 MiB, ONNX
    python benchmarks/memory.py --framework torch
    python benchmarks/memory.py --mib 2048 --limit 1024        # of private memory, above the framework's own

The model is a transformer of random weights: ids in, an embedding, blocks of attention and a feed-forward layer, and
logits; ONNX with its weights in a file beside it, PyTorch's from safetensors. Every step is measured in one process,
after another process has taken the same steps with a small model, which is the framework's own share. Peaks are of
resident pages, those of mapped files included (VmHWM), and of private ones alone (RssAnon, looked at every 2 ms).

With `--limit`, RLIMIT_DATA lets the process have no more private memory than that above the framework's own; what it
doesn't get raises MemoryError or ends it.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

MIB = 2**20
VOCABULARY = 1000
STEPS = ("open", "collect", "gptq", "calibrate", "export")


def blocks_for(mib: float, width: int) -> int:
    """How many blocks of 12·width² weights make up a model of a size."""
    return max(1, round((mib * MIB / 4 - 2 * VOCABULARY * width) / (12 * width * width)))


def write_onnx(path: Path, width: int, blocks: int, *, tokens: int = 16, heads: int = 8) -> int:
    """Write the transformer, weights beside it, one at a time; returns the bytes of its weights."""
    import onnx
    from onnx import TensorProto as T
    from onnx import helper as h

    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []
    written = 0
    data = path.with_name(path.name + ".data")
    with data.open("wb") as file:

        def weight(name: str, *shape: int, scale: float | None = None) -> str:
            nonlocal written
            values = rng.standard_normal(shape, np.float32) * np.float32(scale or shape[0] ** -0.5)
            tensor = T(name=name, data_type=T.FLOAT, dims=shape, data_location=T.EXTERNAL)
            for key, value in (("location", data.name), ("offset", written), ("length", values.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(values.tobytes())
            written += values.nbytes
            weights.append(tensor)
            return name

        def constant(name: str, values: Any) -> str:
            weights.append(onnx.numpy_helper.from_array(np.asarray(values), name))
            return name

        def op(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
            nodes.append(h.make_node(kind, inputs, [output], output, **attributes))
            return output

        split, joined = (
            constant("split", np.array([0, tokens, heads, width // heads])),
            constant("joined", np.array([0, tokens, width])),
        )
        ones, zeros = constant("ones", np.ones(width, np.float32)), constant("zeros", np.zeros(width, np.float32))

        def heads_of(n: str, name: str, matrix: str) -> str:
            parts = op("Reshape", [op("MatMul", [n, matrix], name), split], f"{name}.heads")
            return op("Transpose", [parts], f"{name}.turned", perm=[0, 2, 3, 1] if name[-1] == "k" else [0, 2, 1, 3])

        root = constant("root", np.float32((width // heads) ** -0.5))
        x = op("Gather", [weight("embedding", VOCABULARY, width, scale=1.0), "ids"], "embedded")
        for b in range(blocks):
            n = op("LayerNormalization", [x, ones, zeros], f"{b}.norm1", axis=-1)
            q, k, v = (heads_of(n, f"{b}.{p}", weight(f"{b}.w{p}", width, width)) for p in "qkv")
            scores = op("Mul", [op("MatMul", [q, k], f"{b}.products"), root], f"{b}.scores")
            mixed = op("MatMul", [op("Softmax", [scores], f"{b}.probabilities", axis=-1), v], f"{b}.mixed")
            flat = op("Reshape", [op("Transpose", [mixed], f"{b}.back", perm=[0, 2, 1, 3]), joined], f"{b}.flat")
            x = op("Add", [x, op("MatMul", [flat, weight(f"{b}.wo", width, width)], f"{b}.o")], f"{b}.residual")
            n = op("LayerNormalization", [x, ones, zeros], f"{b}.norm2", axis=-1)
            up = op("Gelu", [op("MatMul", [n, weight(f"{b}.up", width, 4 * width)], f"{b}.upped")], f"{b}.active")
            down = op("MatMul", [up, weight(f"{b}.down", 4 * width, width)], f"{b}.downed")
            x = op("Add", [x, down], f"{b}.out")
        n = op("LayerNormalization", [x, ones, zeros], "norm", axis=-1)
        op("MatMul", [n, weight("head", width, VOCABULARY)], "logits")
    graph = h.make_graph(
        nodes, "transformer", [h.make_tensor_value_info("ids", T.INT64, ["n", tokens])],
        [h.make_tensor_value_info("logits", T.FLOAT, ["n", tokens, VOCABULARY])], weights,
    )  # fmt: skip
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9), path)
    return written


def write_torch(path: Path, width: int, blocks: int) -> int:
    """Write the weights of `torch_model` to a safetensors file, block by block; returns their bytes."""
    from safetensors.torch import save_file

    model = torch_model(width, blocks)
    save_file(dict(model.state_dict()), path)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def torch_model(width: int, blocks: int, *, heads: int = 8) -> Any:
    """The same transformer in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x: Any) -> Any:
            shape = (x.shape[0], x.shape[1], heads, width // heads)
            n = self.norm1(x)
            q, k, v = (p(n).reshape(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
            mixed = torch.softmax(q @ k.transpose(2, 3) * (width // heads) ** -0.5, -1) @ v
            x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, width), *(Block() for _ in range(blocks)), nn.LayerNorm(width),
        nn.Linear(width, VOCABULARY, bias=False),
    ).eval()  # fmt: skip


def status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Peaks:
    """Peaks of memory while a step runs."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        private, data, done = [status("RssAnon")], [status("VmData")], threading.Event()

        def watch() -> None:
            while not done.wait(0.002):
                private[0], data[0] = max(private[0], status("RssAnon")), max(data[0], status("VmData"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        begin = time.perf_counter()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.found[name] = {
                "peak": status("VmHWM"), "private": private[0], "data": data[0],
                "seconds": time.perf_counter() - begin,
            }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """All steps, in this process."""
    from bitwright import QuantSim

    folder = Path(args.folder)
    peaks = Peaks()
    tokens = 16
    rng = np.random.default_rng(1)
    data = [{"ids": rng.integers(0, VOCABULARY, (4, tokens))} for _ in range(args.batches)]
    model: Any = folder / "model.onnx"
    sample = None
    if args.framework == "torch":
        import torch
        from safetensors.torch import load_file

        with torch.device("meta"):
            model = torch_model(args.width, args.blocks)
        model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        sample = torch.from_numpy(data[0]["ids"])
        data = [d["ids"] for d in data]  # type: ignore[misc]
    if args.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (args.limit, args.limit))
    sim: Any = None

    def opened() -> None:
        nonlocal sim
        sim = QuantSim(model, sample, weights="int4:block32", target=args.target)

    def collected() -> None:
        from bitwright.bank import collect

        collect(sim, data, folder / "bank", budget_gib=args.bank_mib / 1024)

    work: dict[str, Callable[[], Any]] = {
        "open": opened,
        "collect": collected,
        "gptq": lambda: sim.apply("gptq", data, inputs=args.inputs, scales=args.scales),
        "calibrate": lambda: sim.calibrate(data),
        "export": lambda: sim.export(folder / "out"),
    }
    try:
        for name in args.steps:
            with peaks.step(name):
                work[name]()
    finally:
        print("PEAKS " + json.dumps(peaks.found), flush=True)


def child(options: dict[str, Any]) -> tuple[dict[str, dict[str, float]], str]:
    """`run` in a process of its own: peaks of the steps that were taken, and why it ended early."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(options)], capture_output=True, text=True, check=False
    )
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("PEAKS ")]
    error = "" if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"
    return (found[-1] if found else {}), error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=256, help="size of the model's weights")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--framework", choices=["onnx", "torch"], default="onnx")
    parser.add_argument("--limit", type=float, help="MiB of private memory above the framework's own")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--inputs", default="float", help="of gptq: float or quantized")
    parser.add_argument("--scales", default="keep", help="of gptq: keep or search, which takes much longer")
    parser.add_argument("--target", default="default")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--bank-mib", type=float, default=64, help="size of the second moments that the bank keeps")
    parser.add_argument("--folder", help="where the models are written (a temporary folder)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run(argparse.Namespace(**json.loads(args.child)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sizes = {}
        options = {}
        for name, width, blocks in (("small", 64, 1), ("model", args.width, blocks_for(args.mib, args.width))):
            place = Path(folder) / name
            place.mkdir()
            if args.framework == "onnx":
                sizes[name] = write_onnx(place / "model.onnx", width, blocks)
            else:
                sizes[name] = write_torch(place / "model.safetensors", width, blocks)
            options[name] = {
                **vars(args), "folder": str(place), "width": width, "blocks": blocks, "limit": 0,
            }  # fmt: skip
        own, error = child(options["small"])
        if error:
            print(f"the small model: {error}")
            return 1
        base = {key: max(step[key] for step in own.values()) for key in ("peak", "private", "data")}
        size = sizes["model"]
        if args.limit:
            options["model"]["limit"] = int(base["data"] + args.limit * MIB)
        found, error = child(options["model"])
        print(f"{args.framework}, {size / MIB:.0f} MiB of weights; the framework's own: {base['peak'] / MIB:.0f} MiB, "
              f"{base['private'] / MIB:.0f} private")  # fmt: skip
        for name, step in found.items():
            peak, private, data = (step[key] - base[key] for key in ("peak", "private", "data"))
            print(f"{name:10} peak {peak / MIB:6.0f} MiB = {peak / size:5.2f}x   private {private / MIB:6.0f} MiB = "
                  f"{private / size:5.2f}x   mapped {data / MIB:6.0f} MiB   {step['seconds']:.1f} s")  # fmt: skip
        if error:
            print(f"ended early: {error}")
        return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main())
