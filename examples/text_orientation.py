"""Quantize a pretrained text-orientation classifier to 8 bits and measure what an integer runtime makes of it.

The model is PP-OCR's line-orientation classifier (MobileNetV3, ONNX, opset 11), as PyPI's `rapidocr` ships it: it tells
whether a line of text is upright or upside down. The data are sentences of Python's own documentation, rendered with
Pillow's font and turned by 180° or not, so that every label is certain.

    python examples/text_orientation.py [OUT]
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bitwright.cli import main as bitwright

MODEL = "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx"
HEIGHT, WIDTH = 48, 192
CALIBRATION_LINES, TEST_LINES = 125, 300


def model_path() -> Path:
    """The classifier inside the installed `rapidocr` (which isn't imported)."""
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the demo's model comes with rapidocr: pip install --no-deps rapidocr")
    return Path(spec.submodule_search_locations[0]) / MODEL


def sentences(count: int) -> list[str]:
    """English lines of 10 to 25 characters from the documentation that comes with Python."""
    from pydoc_data.topics import topics

    prose = " ".join(text for _, text in sorted(topics.items()))
    lines: dict[str, None] = {}
    for sentence in re.findall(r"[A-Z][a-z]+(?: [a-z,']+){3,}", prose):
        words, line = sentence.split(), ""
        for word in words:
            if len(line) + len(word) > 24:
                break
            line = f"{line} {word}".strip()
        if len(line) >= 10:
            lines[line] = None
    chosen = np.random.default_rng(0).permutation(list(lines))[:count]
    return [str(line) for line in chosen]


def render(line: str, *, upside_down: bool) -> np.ndarray:
    """A line as the classifier takes it: BGR, 3 × 48 × 192, (x/255 − 0.5)/0.5, padded with zeros on the right."""
    font = ImageFont.load_default(32)
    left, top, right, bottom = font.getbbox(line)
    image = Image.new("RGB", (int(right - left) + 12, int(bottom - top) + 12), "white")
    ImageDraw.Draw(image).text((6 - left, 6 - top), line, fill="black", font=font)
    if upside_down:
        image = image.rotate(180)
    width = min(WIDTH, round(image.width * HEIGHT / image.height))
    pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)[..., ::-1]
    canvas = np.zeros((3, HEIGHT, WIDTH), np.float32)
    canvas[:, :, :width] = ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)
    return canvas


def dataset(lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Every line upright (label 0) and upside down (label 1)."""
    images = np.stack([render(line, upside_down=turned) for line in lines for turned in (False, True)])
    return images, np.tile(np.array([0, 1], np.int64), len(lines))


def run(*arguments: object) -> None:
    """Run a bitwright command and stop where it fails."""
    words = [str(a) for a in arguments]
    print(f"\n$ bitwright {shlex.join(words)}", flush=True)
    if code := bitwright(words):
        sys.exit(code)


def main(out: Path) -> None:
    """Render the data, then do what a user would do on the command line."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    lines = sentences(CALIBRATION_LINES + TEST_LINES)
    for name, part in (("calibration", lines[:CALIBRATION_LINES]), ("test", lines[CALIBRATION_LINES:])):
        images, labels = dataset(part)
        np.save(data / f"{name}.npy", images)
        np.save(data / f"{name}_labels.npy", labels)
    run("quantize", model_path(), "--data", data / "calibration.npy", "--labels", data / "calibration_labels.npy",
        "--recipe", "fold_batch_norm", "--target", "onnxruntime-cpu",
        "--out", out / "orientation", "--name", "orientation")  # fmt: skip
    run("verify", out / "orientation", "--data", data / "test.npy", "--labels", data / "test_labels.npy")
    print(f"\nReport: {out / 'orientation' / 'report.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
