"""EfficientNet-Lite0: auto_quantize within a drop of one point, and mixed precision against uniform 8 bits.

    python benchmarks/efficientnet_lite0.py lite0.onnx          # once; needs torch
    python benchmarks/auto_lite0.py lite0.onnx --images imagenet.tar [--only auto,mixed] [--out DIR] [--json out.json]

The first half of the images calibrates, the second half evaluates. `auto` is W8A8 with one scale a weight tensor, an
allowed drop of one point and ten minutes. `mixed` chooses between 8- and 4-bit weights for each layer, with 8-bit
activations and per-channel weights, within a drop of 1.5 points; uniform W8A8 is what it is compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path)
parser.add_argument("--images", help="a .tar or folder of *_LABEL.jpg; default: foolbox's 20 photos")
parser.add_argument("--limit", type=int, help="use only so many images")
parser.add_argument("--only", default="auto,mixed")
parser.add_argument("--techniques", help="recipe of every network that mixed precision evaluates, such as adaround")
parser.add_argument("--target", default="per_tensor", help="of auto")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--out", type=Path, help="where bundles and pages are written")
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(arguments.threads)

from imagenet import photos  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from bitwright import auto_quantize, mixed_precision  # noqa: E402

console = Console(width=130)
images, labels = photos(arguments.images)
images, labels = images[: arguments.limit], labels[: arguments.limit]
half = len(images) // 2
calibration, held_out = {"image": images[:half]}, ({"image": images[half:]}, labels[half:])
results: dict[str, object] = {"images": half, "threads": arguments.threads}


def folder(name: str) -> Path | None:
    return None if arguments.out is None else arguments.out / name


def auto() -> None:
    begin = time.perf_counter()
    found = auto_quantize(
        arguments.model, calibration, held_out, target=arguments.target, allowed_drop=0.01, budget_seconds=600,
        out=folder("auto"), name="lite0",
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    table = Table("trial", "outcome", "top-1", "change", "seconds", title=f"auto_quantize, {arguments.target}, W8A8")
    for t in found.trials:
        score = ("", "") if t.score is None else (f"{t.score:.2%}", f"{100 * (t.score - found.float_score):+.2f}")
        table.add_row(t.name, t.status.value, *score, f"{t.seconds:.1f}")
    console.print(table)
    console.print(f"{found}; {seconds:.0f} s, {'met' if found.met and seconds <= 600 else 'NOT met'}")
    results["auto"] = {**json.loads(found.to_json()), "wall_seconds": seconds}


def mixed() -> None:
    begin = time.perf_counter()
    found = mixed_precision(
        arguments.model, calibration, held_out, candidates=[("int8", "uint8"), ("int4", "uint8")], allowed_drop=0.015,
        techniques=arguments.techniques, out=folder("mixed"), name="lite0",
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    table = Table("bit-operations", "of W8A8", "predicted SQNR", "top-1", "layers", title="evaluated assignments")
    for p in found.measured:
        layers = ", ".join(f"{n} at {c}" for c, n in p.counts.items())
        table.add_row(
            f"{p.cost:.4g}", f"{p.relative_cost:.1%}", f"{p.predicted_sqnr_db:.1f} dB", f"{p.score:.2%}", layers
        )
    console.print(table)
    good = found.met and found.relative_cost < 1
    console.print(f"{found}; uniform W8A8 {found.reference_score:.2%}; {seconds:.0f} s, {'met' if good else 'NOT met'}")
    results["mixed"] = {**json.loads(found.to_json()), "wall_seconds": seconds}


for section in arguments.only.split(","):
    {"auto": auto, "mixed": mixed}[section.strip()]()
if arguments.json:
    arguments.json.write_text(json.dumps(results, indent=1, default=str))
