"""EfficientNet-Lite0 in 8 bits in a plain ONNX Runtime session: accuracy with and without VNNI, and time.

    python benchmarks/efficientnet_lite0.py lite0.onnx          # once; needs torch
    python benchmarks/plain_session.py lite0.onnx --images imagenet.tar --out models/ \\
        [--older avx2,avx512] [--emulate "qemu-x86_64 -cpu Haswell"] [--nncf ENVIRONMENT/bin/python] [--json out.json]

The first half of the images calibrates, the second half evaluates; all sessions have default options and one thread.
Time is CPU time of whole passes over the evaluation images, batch 1, the best of interleaved rounds, in passes of the
float model on the same CPU.

`--older` runs the same on this CPU as if it had no VNNI (`older_cpu.c`, needs a C compiler and "cpuid_fault" in
/proc/cpuinfo): avx2, or avx512 (AVX-512 without VNNI). `--emulate` runs them under an emulator (Debian's qemu-user;
Haswell has AVX2 and no VNNI) where that isn't possible: accuracy only. What can't saturate must give the same bits in
all of them. `--nncf` quantizes with NNCF's defaults, in an environment of its own with `pip install nncf onnx
onnxruntime`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path)
parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
parser.add_argument("--out", type=Path, required=True, help="folder for the quantized models")
parser.add_argument("--only", help="rows, by the names of their files, separated by commas")
parser.add_argument("--older", default="", help="avx2, avx512 or both, separated by commas")
parser.add_argument("--emulate", help="command that runs a program on another CPU")
parser.add_argument("--nncf", help="python of an environment with nncf, onnx and onnxruntime")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--json", type=Path)

RUNNER = """
import sys, time, json
import numpy as np, onnxruntime as ort
data, out, rounds, *models = sys.argv[1:]
x = np.load(data)
sessions = {}
for path in models:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    sessions[path] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
seconds, outputs = {path: [] for path in models}, {}
for _ in range(int(rounds)):
    for path, session in sessions.items():
        begin = time.process_time()
        found = [session.run(None, {"image": x[i : i + 1]})[0] for i in range(len(x))]
        seconds[path].append(time.process_time() - begin)
        outputs[path] = np.concatenate(found)
np.savez(out, seconds=np.array(json.dumps({k: min(v) for k, v in seconds.items()})),
         **{str(i): outputs[path] for i, path in enumerate(models)})
"""
"""Runs models by their default sessions; imports as little as it can, since emulators run much and not all."""

NNCF = """
import sys
import numpy as np, onnx, nncf
source, data, target = sys.argv[1:]
x = np.load(data)
dataset = nncf.Dataset(list(range(len(x))), lambda i: {"image": x[i : i + 1]})
onnx.save(nncf.quantize(onnx.load(source), dataset, subset_size=len(x)), target)
"""


@dataclass(frozen=True)
class Cpu:
    """Where models are run: what stands before the command, and what its environment has."""

    name: str
    before: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    rounds: int = 1
    timed: bool = True


def cpus(arguments, folder: Path) -> list[Cpu]:
    """This CPU, and what else was asked for."""
    found = [Cpu("this CPU", rounds=arguments.rounds)]
    kinds = [kind for kind in arguments.older.split(",") if kind]
    if kinds:
        source, library = Path(__file__).with_name("older_cpu.c"), folder / "older_cpu.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        found += [
            Cpu(kind, environment={"OLDER_CPU": kind, "LD_PRELOAD": str(library)}, rounds=arguments.rounds)
            for kind in kinds
        ]
    if arguments.emulate:
        # numpy's own AVX2 code is kept out: emulators run much of it, and not all.
        plain = {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 X86_V3"}
        found.append(Cpu("emulated", tuple(shlex.split(arguments.emulate)), plain, timed=False))
    return found


def run_sessions(models: list[Path], data: Path, cpu: Cpu, folder: Path):
    """Outputs of each model, and the CPU seconds of its best round."""
    import numpy as np

    script, out = folder / "runner.py", folder / "out.npz"
    script.write_text(RUNNER)
    command = [*cpu.before, sys.executable, str(script), str(data), str(out), str(cpu.rounds), *map(str, models)]
    done = subprocess.run(command, env={**os.environ, **cpu.environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    with np.load(out) as found:
        seconds = json.loads(str(found["seconds"]))
        return {m: found[str(i)] for i, m in enumerate(models)}, {m: seconds[str(m)] for m in models}


def quantized(source: Path, out: Path, calibration: Path, nncf: str | None) -> dict[Path, str]:
    """Writes every variant that isn't there yet; file → the row's title."""
    import numpy as np

    from bitwright.simulation import QuantSim

    loose = {"bitwright": {"extends": "onnxruntime-cpu", "pair_sum_bits": None}}
    ours = {
        "u8s8": ("uint8 × int8", {"target": loose}, {}),
        "u8u8": ("… weights stored as uint8 (`--plain-session`)", {"target": loose}, {"plain_session": True}),
        "u8s7": ("… 7-bit weights", {"target": loose, "weights": "int7"}, {}),
        "s8s8": ("int8 × int8", {"target": loose, "activations": "int8"}, {}),
        "cpu": ("**`onnxruntime-cpu`**", {"target": "onnxruntime-cpu"}, {}),
    }
    rows = {}
    data = {"image": np.load(calibration)}
    for name, (title, options, export) in ours.items():
        path = out / f"{name}.qdq.onnx"
        rows[path] = title
        if not path.exists():
            QuantSim(source, **options).calibrate(data).export(out, name=name, **export)
    for name, title in (("ort", "ONNX Runtime's quantizer"), ("ort7", "… `reduce_range`")):
        rows[out / f"{name}.qdq.onnx"] = title
        peer(source, out / f"{name}.qdq.onnx", data["image"], reduce_range=name == "ort7")
    if nncf:
        path, single = out / "nncf.qdq.onnx", out / "single.onnx"
        rows[path] = "NNCF, defaults"
        if not path.exists():
            subprocess.run([nncf, "-c", NNCF, str(single), str(calibration), str(path)], check=True)
    return rows


def peer(source: Path, path: Path, images, *, reduce_range: bool) -> None:
    """ONNX Runtime's static quantizer: per channel, min-max, QDQ."""
    import onnx
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self):
            self.left = iter(images)

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {"image": image[None]}

    single, prepared = path.parent / "single.onnx", path.parent / "prepared.onnx"
    if not prepared.exists():
        onnx.save(onnx.load(source), single)  # its pre-processing can't follow external weights
        q.quant_pre_process(str(single), str(prepared), skip_symbolic_shape=True)
    if not path.exists():
        q.quantize_static(str(prepared), str(path), Reader(), quant_format=q.QuantFormat.QDQ, per_channel=True,
                          reduce_range=reduce_range, activation_type=q.QuantType.QUInt8,
                          weight_type=q.QuantType.QInt8)  # fmt: skip


def main() -> None:
    """The table."""
    arguments = parser.parse_args()
    import numpy as np
    from imagenet import photos
    from rich.console import Console
    from rich.table import Table

    from bitwright_onnx.export.plain_session import risks_of, saturates_here

    images, labels = photos(arguments.images)
    half, truth = len(images) // 2, labels[len(images) // 2 :]
    arguments.out.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = arguments.out / "calibration.npy", arguments.out / "evaluation.npy"
    np.save(calibration, images[:half])
    np.save(evaluation, images[half:])
    rows = quantized(arguments.model, arguments.out, calibration, arguments.nncf)
    if arguments.only:
        rows = {p: t for p, t in rows.items() if p.name.split(".")[0] in arguments.only.split(",")}
    titles = {arguments.model: "float", **rows}
    risks = {path: risks_of(path).pairs for path in rows}
    found = [{"title": t, "file": p.name, "layers": len(risks.get(p, ())), "cpus": {}} for p, t in titles.items()]
    with tempfile.TemporaryDirectory() as folder:
        seen = cpus(arguments, Path(folder))
        for cpu in seen:
            outputs, seconds = run_sessions(list(titles), evaluation, cpu, Path(folder))
            if cpu is seen[0]:
                native = outputs
            for row, path in zip(found, titles, strict=True):
                if path in rows and not risks[path] and not np.array_equal(outputs[path], native[path]):
                    raise SystemExit(f"{path}: no sum can saturate, and yet {cpu.name} computes something else")
                row["cpus"][cpu.name] = figures(outputs[path], native[arguments.model], truth)
                if cpu.timed:
                    row["cpus"][cpu.name]["time"] = seconds[path] / seconds[arguments.model]
    heads = [f"{cpu.name}: {what}" for cpu in seen for what in ("top-1", "same class", *(["time"] * cpu.timed))]
    table = Table("", "layers that can saturate", *heads)
    for row in found:
        cells = [f"{v:.2f}" if k == "time" else f"{v:.1%}" for far in row["cpus"].values() for k, v in far.items()]
        table.add_row(row["title"], str(row["layers"]), *cells)
    host = f"{model_name()}, which {'saturates' if saturates_here() else 'does not saturate'}"
    Console(width=160).print(f"this CPU: {host}; {len(truth)} photos", table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"host": host, "photos": len(truth), "rows": found}, indent=1))


def figures(output, reference, truth) -> dict[str, float]:
    """Top-1, and the share of photos with the float model's class."""
    classes = output.argmax(1)
    return {"top1": float((classes == truth[: len(classes)]).mean()),
            "same": float((classes == reference[: len(classes)].argmax(1)).mean())}  # fmt: skip


def model_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
