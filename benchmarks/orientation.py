"""PP-OCR's text-line orientation classifier (MobileNetV3, unfolded batch norms, opset 11): recipes at W8A8 and W4A8.

    pip install --no-deps rapidocr pillow
    python benchmarks/orientation.py [--json out.json]

Model and data are those of `examples/text_orientation.py`: 250 rendered lines calibrate, 600 others evaluate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from rich.console import Console
from rich.table import Table
from text_orientation import CALIBRATION_LINES, TEST_LINES, dataset, model_path, sentences

from bitwright.simulation import QuantSim
from bitwright.verify import verify

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--json", type=Path)
arguments = parser.parse_args()

FOLD, CLE, BIAS = "fold_batch_norm", "cross_layer_equalization", "bias_correction"
RECIPES = {
    "W8A8 per channel": ("onnxruntime-cpu", "int8", ([FOLD], [FOLD, BIAS])),
    "W8A8 per tensor": ("per_tensor", "int8", ([FOLD], [FOLD, CLE], [FOLD, CLE, BIAS])),
    "W4A8 per channel": ("onnxruntime-cpu", "int4", ([FOLD], [FOLD, "seq_mse"], [FOLD, "adaround"])),
}

lines = sentences(CALIBRATION_LINES + TEST_LINES)
calibration, _ = dataset(lines[:CALIBRATION_LINES])
test, labels = dataset(lines[CALIBRATION_LINES:])
rows = []
for title, (target, weights, recipes) in RECIPES.items():
    for recipe in recipes:
        begin = time.perf_counter()
        sim = QuantSim(model_path(), target=target, weights=weights)
        for step in recipe:
            sim.apply(step, calibration)
        sim.calibrate(calibration)
        seconds = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            sim.export(folder)
            seen = verify(folder, test, labels, float_model=model_path())
        rows.append(
            {"title": title, "recipe": ", ".join(recipe), "seconds": seconds, **seen.accuracy, **seen.agreement}
            | {f"sqnr {k}": v for k, v in seen.sqnr_db.items()}
            | {"exact differs": seen.exact["output_differs"]}
        )
        print(rows[-1], flush=True)

table = Table("setting", "recipe", "float", "simulated", "integer", "integer = float", "seconds")
for row in rows:
    figures = (f"{row[k]:.1%}" for k in ("float", "simulated", "integer", "integer_float"))
    table.add_row(row["title"], row["recipe"], *figures, f"{row['seconds']:.0f}")
Console(width=130).print(table)
if arguments.json:
    arguments.json.write_text(json.dumps(rows, indent=1))
