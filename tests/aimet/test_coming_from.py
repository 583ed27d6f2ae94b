"""The blocks of the pages for those who come from other tools run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_script_of_aimet_for_keras(tmp_path, monkeypatch):
    keras = pytest.importorskip("keras")
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype(np.float32)
    layers = [keras.Input((6, 6, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(),
              keras.layers.ReLU(), keras.layers.Flatten(), keras.layers.Dense(2)]  # fmt: skip
    given = {"model": keras.Sequential(layers), "images": images, "batches": [images[:4], images[4:]],
             "targets": np.zeros((8, 2))}  # fmt: skip
    first, second = blocks("coming-from-aimet.md")
    exec(first, given)
    assert (tmp_path / "out" / "net.encodings").is_file()
    given["model"] = keras.Sequential(layers)
    exec(second, given)
    assert given["sim"].encodings


@pytest.mark.parametrize("number", range(3))
def test_blocks_for_others(number, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    batches = [torch.randn(4, 8), torch.randn(4, 8)]
    found = blocks("coming-from-others.md")
    assert len(found) == 3
    given = {"model": model, "sample": batches[0], "batches": batches}
    exec(found[number], given)
    assert given["sim"].encodings
