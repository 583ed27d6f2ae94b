"""W8A8 of vision architectures: float ONNX, simulation, ONNX Runtime's default session and the opt-in one, in decibels.

    python benchmarks/architectures_w8a8.py --out w8a8.jsonl [--only resnet18,yolov8n] [--seconds 600] [--docs]

Each model runs in a process of its own with a time limit; finished ones are read back from the file, so that a run
that was stopped goes on. Needs torchvision, timm, segmentation-models-pytorch and ultralytics beside bitwright
(`pip install torch==2.14.1 torchvision==0.29.1 timm segmentation-models-pytorch ultralytics`); what isn't installed is
a row with that reason. Weights are random, batch norms have the statistics of the images, which are smooth and random,
and are folded: decibels show whether the four agree, not what a trained network loses.

What two right computations of one deep network differ by at the end is shown beside it: the simulation against itself,
its images changed by up to 2^-21 of each value, a few codes of the first tensor. Of an untrained network whose signal
is lost in quantization noise, that makes a noise of its own. A plain session *departs* where its figure is more than
1 dB from the simulation's and it is further from the simulation than that, by more than 3 dB; its file has then
already been compared with the simulation op by op, on equal inputs, by the export. `--docs` writes the section of
docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SIZE, SAMPLES = 224, 8
NUDGE = 2.0**-21
"""Part of each value by which images are changed to see what rounding alone makes of a network."""
DEPARTS, FURTHER = 1.0, 3.0
"""Decibels between the figures of plain session and simulation, and beyond the network's own answer to rounding."""
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
HEADING = "## W8A8 in ONNX Runtime"


def _torchvision(name: str) -> Callable[[], Any]:
    return lambda: __import__("torchvision").models.get_model(name, weights=None)


def _detection(name: str) -> Callable[[], Any]:
    def build() -> Any:
        import torchvision

        return torchvision.models.get_model(name, weights=None, weights_backbone=None).backbone

    return build


def _timm(name: str) -> Callable[[], Any]:
    return lambda: __import__("timm").create_model(name, pretrained=False)


def _smp(name: str) -> Callable[[], Any]:
    def build() -> Any:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)("resnet18", encoder_weights=None)

    return build


def _yolo(name: str) -> Callable[[], Any]:
    return lambda: __import__("ultralytics").YOLO(f"{name}.yaml").model


def _plain() -> Any:
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


BUILDERS: dict[str, Callable[[], Any]] = {
    "plain": _plain,
    **{n: _torchvision(n) for n in ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0",
                                    "shufflenet_v2_x1_0", "densenet121", "regnet_y_400mf")},
    **{f"{n} backbone": _detection(n) for n in ("retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large")},
    **{f"timm {n}": _timm(n) for n in ("swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "convnext_atto",
                                       "efficientnet_lite0", "mobilenetv3_large_100", "deit_tiny_patch16_224",
                                       "repvgg_a0")},
    **{f"smp {n}": _smp(n) for n in ("Unet", "DeepLabV3")},
    **{n: _yolo(n) for n in ("yolov8n", "yolo11n")},
}  # fmt: skip


def images(count: int = SAMPLES, size: int = SIZE) -> np.ndarray:
    """Smooth random fields of several scales, as photographs have them, normalized: (count, 3, size, size)."""
    rng = np.random.default_rng(0)
    made = np.zeros((count, 3, size, size), np.float32)
    for cells in (4, 8, 16, 32, 64, size):
        coarse = rng.normal(size=(count, 3, cells, cells)).astype(np.float32)
        rows = np.minimum(np.arange(size) * cells // size, cells - 1)
        made += coarse[:, :, rows][:, :, :, rows] / np.sqrt(cells)
    return made / made.std()


def settle(net: Any, x: Any) -> None:
    """Give batch norms the statistics of the images, in place: without training, signals fade to 1e-10 with depth."""
    from torch import nn

    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    net(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def decibels(signal: list[np.ndarray], noisy: list[np.ndarray]) -> float:
    """Signal to noise of the worst float output; infinite where equal."""
    from bitwright.verify import sqnr

    return min((sqnr(a, b) for a, b in zip(signal, noisy, strict=True) if a.dtype.kind == "f"), default=float("nan"))


def measure(name: str, samples: int, size: int) -> dict[str, Any]:
    """One row, on so many images of size²."""
    import onnxruntime as ort
    import torch

    from bitwright import QuantSim
    from bitwright_onnx.backend import OnnxBackend

    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = BUILDERS[name]().float().eval()
    x = images(samples, size)
    with torch.no_grad():
        settle(net, torch.from_numpy(x))
        net(torch.from_numpy(x[:2]))  # what keeps tensors by shape has them
    sim = QuantSim(net, torch.from_numpy(x[:2]), target="onnxruntime-cpu").apply("fold_batch_norm")
    name = sim.graph.inputs[0]
    batch = {name: x}
    sim.calibrate(batch)
    floats, simulated = sim.predict(batch, simulated=False), sim.predict(batch)
    rng = np.random.default_rng(1)
    nudged = [sim.predict({name: (x * (1 + rng.uniform(-NUDGE, NUDGE, x.shape))).astype(np.float32)}) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        bundle = sim.export(folder, name="m")

        def run(form: str, *, precise: bool = False) -> list[np.ndarray]:
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            if precise:
                options.add_session_config_entry("session.x64quantprecision", "1")
            session = ort.InferenceSession(str(bundle.files[form]), options, providers=["CPUExecutionProvider"])
            return [np.asarray(v) for v in session.run(None, {session.get_inputs()[0].name: x})]

        return {
            "onnx": decibels(floats, run("model")),
            "simulation": decibels(floats, simulated),
            "plain": decibels(floats, run("qdq")),
            "opt_in": decibels(floats, run("qdq", precise=True)),
            "plain_to_simulation": decibels(simulated, run("qdq")),
            "nudged_to_simulation": min(decibels(simulated, n) for n in nudged),
            "can_saturate": len(OnnxBackend().plain_risks(bundle).pairs),
            "torch": torch.__version__,
            "samples": samples,
            "size": size,
        }


def departs(row: dict[str, Any]) -> bool:
    """Whether the plain session gives another figure than the simulation, and rounding doesn't explain it."""
    apart = abs(row["plain"] - row["simulation"]) > DEPARTS
    return apart and row["plain_to_simulation"] < row["nudged_to_simulation"] - FURTHER


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown; a row that `departs` is marked."""
    lines = [
        "| architecture | float ONNX | simulation | plain session | opt-in session | plain to simulation | nudged |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = ("onnx", "simulation", "plain", "opt_in", "plain_to_simulation", "nudged_to_simulation")
    for name, row in rows.items():
        if "failure" in row:
            lines.append(f"| {name} | {row['failure'][:120]} | | | | | |")
            continue
        figures = " | ".join(f"{row[k]:.1f}" if row[k] < float("inf") else "equal" for k in columns)
        used = row.get("samples", SAMPLES), row.get("size", SIZE)
        smaller = "" if used == (SAMPLES, SIZE) else f" ({used[0]} images of {used[1]}²)"
        lines.append(f"| {name}{smaller} | {figures}{' **departs**' if departs(row) else ''} |")
    return "\n".join(lines)


def section(rows: dict[str, dict[str, Any]]) -> str:
    """What docs/architectures.md says of the rows."""
    done = {n: r for n, r in rows.items() if "failure" not in r}
    wanted = [n for n in BUILDERS if n != "plain"]
    left = [n for n in wanted if n not in done]
    missing = "" if not left else f" Not run, or not to the end: {', '.join(left)}."
    apart = [n for n, r in done.items() if abs(r["plain"] - r["simulation"]) > DEPARTS]
    marked = [n for n in apart if departs(done[n])]
    versions = " and ".join(sorted({r["torch"] for r in done.values()}))
    risky = [n for n, r in done.items() if r["can_saturate"]]
    saturating = f"sums can saturate in {', '.join(risky)}" if risky else "no sum of products can saturate in any"
    return "\n".join([
        HEADING, "",
        f"Made by `python benchmarks/architectures_w8a8.py --docs` with PyTorch {versions}: {len(done)} of "
        f"{len(wanted)} architectures.{missing} Weights are random, batch norms have the statistics of {SAMPLES} "
        f"smooth random images of {SIZE}² (fewer or smaller ones where a row says so) and are folded; these images are "
        "the calibration data and the inputs too. "
        f"Target `onnxruntime-cpu`, default scheme, one thread, a host with VNNI; without it {saturating} "
        "([run on a target](on-target.md#what-a-plain-session-computes)). The worst output of each counts, in "
        "decibels: the first four columns against the float model (*opt-in* is the session with "
        "`session.x64quantprecision`).", "",
        "*Plain to simulation* is the one against the other, and *nudged* the simulation against itself with its "
        "images changed by up to 2⁻²¹ of each value: what float rounding alone makes of the network "
        "(*equal*: not a bit is another). Each file was "
        "compared with the simulation op by op, on equal inputs, when it was exported, and equals it but for "
        f"rounding. {_told(apart, marked)} Untrained depths lose much at 8 bits: low figures say nothing of trained "
        "networks.", "",
        table({n: rows[n] for n in wanted if n in rows}), "",
    ])  # fmt: skip


def _told(apart: list[str], marked: list[str]) -> str:
    if not apart:
        return f"No plain session is more than {DEPARTS:g} dB from its simulation."
    here = f"More than {DEPARTS:g} dB between the figures of simulation and plain session: {', '.join(apart)}"
    if not marked:
        return f"{here}; no further apart there than rounding moves the simulation (within {FURTHER:g} dB)."
    return f"{here}; unexplained by rounding: {', '.join(marked)}."


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("architectures_w8a8.jsonl"))
    parser.add_argument("--only", default="", help="names, with commas")
    parser.add_argument("--seconds", type=int, default=600, help="limit of one model")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="images")
    parser.add_argument("--size", type=int, default=SIZE, help="their height and width")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--docs", action="store_true", help=f"write the section of {PAGE.name} from what is there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        warnings.simplefilter("ignore")
        sys.stdout.write(json.dumps(measure(asked.one, asked.samples, asked.size)) + "\n")
        return
    lines = asked.out.read_text().splitlines() if asked.out.exists() else []
    rows: dict[str, dict[str, Any]] = {r["name"]: r for r in map(json.loads, lines)}
    done = asked.table or asked.docs
    for name in asked.only.split(",") if asked.only else [] if done else [n for n in BUILDERS if n != "plain"]:
        if name in rows and "failure" not in rows[name]:
            continue
        started = time.monotonic()
        command = [sys.executable, __file__, "--one", name, "--samples", str(asked.samples), "--size", str(asked.size)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=asked.seconds, check=False)
            said = (ran.stderr.strip().splitlines() or ["no output"])[-1]
            row = json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else {"failure": said}
        except subprocess.TimeoutExpired:
            row = {"failure": f"not finished after {asked.seconds} s"}
        rows[name] = {"name": name, "seconds": round(time.monotonic() - started, 1), **row}
        with asked.out.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
    sys.stdout.write(table(rows) + "\n")
    if asked.docs:
        before = PAGE.read_text(encoding="utf-8").split(HEADING)[0]
        PAGE.write_text(before + section(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
