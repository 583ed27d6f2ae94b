"""What docs/quickstart.md says that each of Keras's networks wants is what Keras's own `preprocess_input` gives."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
image = pytest.importorskip("PIL.Image")

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"


def rows():
    text = PAGE.read_text(encoding="utf-8").partition("### Folders of images")[2].partition("\n## ")[0]
    for networks, option in re.findall(r"^\| (.*?) \| `(--image-scaling .*?)`", text, re.M):
        for name in re.findall(r"`(\w+)`", networks.partition("(mode")[0]):
            if hasattr(keras.applications, name):
                yield name, option


def test_the_table_names_most_of_them():
    assert len(list(rows())) >= 14


@pytest.mark.parametrize(("name", "option"), list(rows()))
def test_the_option_gives_what_the_network_wants(name, option, tmp_path):
    from bitwright.cli.options import image_options
    from bitwright.data import open_data

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image.fromarray(pixels).save(tmp_path / "photo.png")
    words = shlex.split(option)
    found = image_options(words[1], None, "--image-bgr" in words, None, tmp_path)
    (batch,) = open_data(tmp_path, {"x": ((None, 8, 8, 3), "float32")}, images=found)
    wanted = getattr(keras.applications, name).preprocess_input(pixels[None].astype(np.float32))
    np.testing.assert_allclose(batch["x"], wanted, rtol=1e-5, atol=1e-4)
