"""Makes the reports of `docs/reading-reports.md` and photographs them in Chromium, into `docs/pictures/`.

    pip install "bitwright[torch,report,search]" scikit-learn pillow
    python benchmarks/report_pictures.py                 # a minute; needs `chromium` on the path

The network is that of the PyTorch quickstart, whose first block is run as it stands, with two bits for weights.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
EVALUATED = ("--data", "calibration.npz", "--evaluation-data", "test.npz", "--labels", "labels.npy")
RUNS = [
    ("quantize", "digits.onnx", *EVALUATED, "--weights", "int2", "--out", "runs/nearest"),
    ("quantize", "digits.onnx", *EVALUATED, "--weights", "int2", "--recipe", "adaround", "--out", "runs/adaround"),
    ("diff", "runs/nearest", "runs/adaround", "--out", "diff.html"),
    ("analyze", "digits.onnx", "--data", "test.npz", "--labels", "labels.npy", "--weights", "int2", "--samples", "128",
     "--out", "analysis"),
    ("auto", "digits.onnx", *EVALUATED, "--weights", "int2", "--allowed-drop", "0.01", "--out", "auto"),
    ("mixed-precision", "digits.onnx", *EVALUATED, "--candidates", "int8/uint8,int4/uint8,int2/uint8",
     "--allowed-drop", "0.01", "--out", "mixed"),
]  # fmt: skip
PICTURES = [
    # name, page, width, height
    ("report", "runs/adaround/report.html", 1280, 920),
    ("report-phone", "runs/adaround/report.html", 390, 1080),
    ("analysis", "analysis/analysis.html", 1280, 960),
    ("diagnosis", "auto/diagnosis.html", 1280, 800),
    ("mixed-precision", "mixed/mixed_precision.html", 1280, 700),
    ("diff", "diff.html", 1280, 640),
]


def model() -> None:
    """The quickstart's network and data, as files in the current folder."""
    page = (DOCS / "quickstart-pytorch.md").read_text(encoding="utf-8")
    space: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.S)[0], space)
    images, labels, test = space["images"], space["labels"], space["test"]
    torch.onnx.export(
        space["model"], (torch.tensor(images[:2]),), "digits.onnx", dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("n")},), input_names=["image"], output_names=["scores"],
    )  # fmt: skip
    np.savez("calibration.npz", image=images[space["calibration"]])
    np.savez("test.npz", image=images[test])
    np.save("labels.npy", labels[test])


def main() -> None:
    """All of it, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        model()
        for words in RUNS:
            subprocess.run([sys.executable, "-m", "bitwright", *words], check=True, stdout=subprocess.DEVNULL)
        for name, page, width, height in PICTURES:
            subprocess.run(
                ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 "--force-color-profile=srgb", f"--window-size={width},{height}", "--screenshot=shot.png",
                 Path(page).absolute().as_uri()],
                check=True, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            # 64 colours are enough for text and bars, and take a third of the space.
            file = DOCS / "pictures" / f"{name}.png"
            Image.open("shot.png").convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)
            print(file, file.stat().st_size)
        os.chdir(DOCS)


if __name__ == "__main__":
    main()
