"""EfficientNet-Lite0 in ONNX: accuracy of recipes at W8A8 and W4A8, agreement with the integer runtime, cost.

    python benchmarks/efficientnet_lite0.py lite0.onnx          # once; needs torch
    python benchmarks/lite0.py lite0.onnx --images imagenet.tar [--only w8,tensor,w4,cost] [--json out.json]

The first half of the images calibrates, the second half evaluates. Everything runs on --threads threads. The peer
is ONNX Runtime's own static quantizer (per-channel, min-max, QDQ) on the same images, run by the same runtime.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path)
parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
parser.add_argument("--only", default="w8,tensor,w4,cost")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(arguments.threads)

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
from imagenet import photos  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from bitwright.simulation import QuantSim  # noqa: E402
from bitwright.verify import verify  # noqa: E402

console = Console(width=120)
images, labels = photos(arguments.images)
half = len(images) // 2
calibration, evaluation, truth = {"image": images[:half]}, {"image": images[half:]}, labels[half:]
results: dict[str, object] = {"images": half, "threads": arguments.threads}


def top1(sim: QuantSim, *, simulated: bool = True) -> float:
    return float((sim.predict(evaluation, simulated=simulated)[0].argmax(1) == truth).mean())


def timed(function, *args, **kwargs):
    begin = time.perf_counter()
    value = function(*args, **kwargs)
    return value, time.perf_counter() - begin


def recipe(title: str, steps, **options) -> tuple[QuantSim, dict]:
    begin = time.perf_counter()
    sim = QuantSim(arguments.model, **options)
    for name, settings in steps:
        sim.apply(name, calibration, **settings)
    sim.calibrate(calibration)
    seconds = time.perf_counter() - begin
    row = {"title": title, "float": top1(sim, simulated=False), "simulated": top1(sim), "seconds": seconds}
    row["reports"] = {name: dict(report.figures) for name, report in sim.reports}
    console.print(f"  {title}: simulated {row['simulated']:.1%} in {seconds:.0f} s")
    return sim, row


def show(title: str, rows: list[dict], columns: list[str]) -> None:
    table = Table("recipe", *columns, title=title)
    for row in rows:
        cells = [f"{row[c]:.1%}" if isinstance(row.get(c), float) and c != "seconds" else f"{row.get(c, ''):.0f}"
                 if c == "seconds" and c in row else str(row.get(c, "")) for c in columns]  # fmt: skip
        table.add_row(row["title"], *cells)
    console.print(table)


def w8() -> None:
    """W8A8 on the default target, verified on the integer runtime, beside ONNX Runtime's quantizer."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for scheme in ("minmax", "sqnr"):
            sim, row = recipe(f"bitwright, {scheme}", [], scheme=scheme)
            out = Path(folder) / scheme
            sim.export(out, name="lite0")
            seen = verify(out, evaluation, truth)
            row |= {"integer": seen.accuracy["integer"], "agreement": seen.agreement["integer_float"],
                    "exact = runtime": 1 - seen.exact["output_differs"], "verification": seen.model_dump()}  # fmt: skip
            rows.append(row)
        rows.append(peer(Path(folder)))
    results["w8"] = rows
    show("W8A8, per-channel weights", rows,
         ["float", "simulated", "integer", "agreement", "exact = runtime", "seconds"])  # fmt: skip


def peer(folder: Path) -> dict:
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self):
            self.left = iter(images[:half])

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {"image": image[None]}

    def run():
        single, source = folder / "single.onnx", folder / "prepared.onnx"
        onnx.save(onnx.load(arguments.model), single)  # its pre-processing can't follow external weights
        q.quant_pre_process(str(single), str(source), skip_symbolic_shape=True)
        q.quantize_static(str(source), str(folder / "peer.onnx"), Reader(), quant_format=q.QuantFormat.QDQ,
                          per_channel=True, activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
                          calibrate_method=q.CalibrationMethod.MinMax)  # fmt: skip

    _, seconds = timed(run)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = arguments.threads
    found = [plain_pass(ort.InferenceSession(str(p), options), evaluation["image"]).argmax(1)
             for p in (folder / "peer.onnx", arguments.model)]  # fmt: skip
    accuracy = [float((classes == truth).mean()) for classes in found]
    agreement = float((found[0] == found[1]).mean())
    title = "ONNX Runtime quantizer"
    return {"title": title, "float": accuracy[1], "integer": accuracy[0], "agreement": agreement, "seconds": seconds}


def plain_pass(session: ort.InferenceSession, x: np.ndarray, batch: int = 32) -> np.ndarray:
    return np.concatenate([session.run(None, {"image": x[i : i + batch]})[0] for i in range(0, len(x), batch)])


CLE, BIAS = ("cross_layer_equalization", {}), ("bias_correction", {})


def tensor() -> None:
    """W8A8 with one scale a weight tensor: what equalization and bias correction win back."""
    options = {"target": "per_tensor", "scheme": "minmax"}
    rows = [
        recipe(title, steps, **options)[1]
        for title, steps in (
            ("nearest, min-max", []),
            ("CLE", [CLE]),
            ("bias correction", [BIAS]),
            ("CLE + bias correction", [CLE, BIAS]),
        )
    ]
    lost = rows[0]["float"] - rows[0]["simulated"]
    for row in rows:
        row["recovered"] = 1 - (rows[0]["float"] - row["simulated"]) / lost if lost else 1.0
    results["tensor"] = rows
    show("W8A8, per-tensor weights", rows, ["float", "simulated", "recovered", "seconds"])


def w4() -> None:
    """W4A8, per-channel weights."""
    rows = []
    for title, steps in (
        ("nearest, min-max", []),
        ("AdaRound", [("adaround", {})]),
        ("SeqMSE", [("seq_mse", {})]),
    ):
        _, row = recipe(title, steps, weights="int4")
        rows.append(row)
    results["w4"] = rows
    show("W4A8, per-channel weights", rows, ["float", "simulated", "seconds"])


def cost() -> None:
    """Ratios to a plain float pass of ONNX Runtime over the same images, on the same threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    session = ort.InferenceSession(str(arguments.model), options)
    x = calibration["image"]
    plain_pass(session, x[:32])
    sims = {s: QuantSim(arguments.model, scheme=s) for s in ("minmax", "sqnr")}
    for sim in sims.values():
        sim.calibrate({"image": x[:32]})
        sim.predict({"image": x[:32]})
    times: dict[str, list[float]] = {}
    for _ in range(3):  # interleaved, so that a busy machine disturbs all alike; the best of each counts
        times.setdefault("float", []).append(timed(plain_pass, session, x)[1])
        for scheme, sim in sims.items():
            times.setdefault(f"{scheme} calibration", []).append(timed(sim.calibrate, calibration)[1])
        times.setdefault("simulated inference", []).append(timed(sims["minmax"].predict, calibration)[1])
    best = {k: min(v) for k, v in times.items()}
    ratios = {k: v / best["float"] for k, v in best.items()}
    table = Table("what", "seconds", "float passes", title=f"Cost over {len(x)} images, {arguments.threads} threads")
    for name, seconds in best.items():
        table.add_row(name, f"{seconds:.2f}", f"{ratios[name]:.2f}")
    console.print(table)
    results["cost"] = {"seconds": best, "ratios": ratios}


for section in arguments.only.split(","):
    {"w8": w8, "tensor": tensor, "w4": w4, "cost": cost}[section.strip()]()
results["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
console.print(f"peak memory {results['peak_mib']} MiB (the images are {images.nbytes // 2**20} MiB of it)")
if arguments.json:
    arguments.json.write_text(json.dumps(results, indent=1, default=str))
