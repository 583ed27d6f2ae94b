"""A folder of images as model input; needs Pillow (extra `images`)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch
from bitwright.data._batches import InputSpecs, batch_dimension, check_batch, single_input
from bitwright.errors import InputError, MissingExtraError, first_line

if TYPE_CHECKING:
    from typing import Self

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
SCALINGS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # name: (mean, deviation) of the pixel values 0 to 255
    "0..255": ((0.0,), (1.0,)),
    "0..1": ((0.0,), (255.0,)),
    "-1..1": ((127.5,), (127.5,)),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
Fit = Literal["crop", "stretch"]
HELD_BYTES = 2**28
"""Pixels of a folder that stay in memory, if all of it fit: solving layers one after another goes through the data two
times a layer, and to read pictures each time took as long as the rest."""
_PIXELS, _PIXELS_A_BYTE = 2**24, 50
"""A picture may have so many pixels, or so many for each byte of its file; photographs have less than ten a byte."""


@dataclass(frozen=True)
class ImageOptions:
    """How an image file becomes model input.

    Attributes:
        scaling: of pixel values: "0..1" (default), "-1..1", "0..255", or "imagenet" (mean and deviation of ImageNet,
            RGB); or a pair (mean, deviation) in units of 0 to 255, each one number or one for each of red, green and
            blue. Integer inputs get the plain pixel values whatever it is.
        fit: "crop" scales the shorter side to the model's and cuts the middle out; "stretch" ignores the aspect.
        bgr: channels in the order blue, green, red.
        size: (height, width), needed only where the model leaves them free.
    """

    scaling: str | tuple[Any, Any] = "0..1"
    fit: Fit = "crop"
    bgr: bool = False
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Lists and numbers of numpy become plain ones: a report keeps them."""
        for name in ("scaling", "size"):
            object.__setattr__(self, name, _plain(getattr(self, name)))

    def __str__(self) -> str:
        """As reports say it: ``values -1..1, crop, RGB``."""
        size = "" if self.size is None else f", {self.size[0]} x {self.size[1]}"
        return f"values {_scaling_text(self.scaling)}, {self.fit}, {'BGR' if self.bgr else 'RGB'}{size}"

    def moments(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and deviation that pixel values are normalized with.

        Raises:
            InputError: unknown scaling, or numbers that can't be a mean and a deviation of values from 0 to 255.
        """
        pair = SCALINGS.get(self.scaling) if isinstance(self.scaling, str) else self.scaling
        if pair is None:
            raise InputError(f"unknown image scaling {self.scaling!r}; known: {', '.join(SCALINGS)}, (mean, deviation)")
        try:
            mean, deviation = (np.atleast_1d(np.asarray(p, np.float32)) for p in pair)
        except (TypeError, ValueError):
            raise InputError(
                f"image scaling {self.scaling!r}: mean and deviation are numbers, or tuples of them"
            ) from None
        if not {mean.shape, deviation.shape} <= {(1,), (3,)}:
            raise InputError(f"image scaling {self.scaling!r}: give one mean and one deviation, or three of each")
        if not (deviation > 0).all():
            raise InputError(f"image scaling {self.scaling!r}: the deviation must be greater than 0")
        if (deviation < 1).all():  # would spread neighbouring pixel values by more than they are apart
            raise InputError(
                f"image scaling {self.scaling!r}: mean and deviation are in units of 0 to 255; multiply those of "
                "values from 0 to 1 by 255"
            )
        return mean, deviation


@dataclass(frozen=True)
class Images:
    """A folder of images as data, wherever its path would be: with how they become input.

    Attributes:
        path: the folder; images of its subfolders too.
        options: how its files are read.
    """

    path: str | Path
    options: ImageOptions = field(default_factory=ImageOptions)


def image_options_of(data: object) -> ImageOptions | None:
    """How opened data are read from images; None of data that aren't a folder of images."""
    return data.options if isinstance(data, ImageFolder) else None


def is_image_folder(path: Path) -> bool:
    """Whether data at a path are read as images: a folder without .npz files of its own."""
    return path.is_dir() and not any(path.glob("*.npz"))


@dataclass(frozen=True)
class ImageFolder:
    """Images of a folder and its subfolders, sorted by path, read batch by batch; once, where all of their pixels take
    no more than `HELD_BYTES` in the model's size."""

    files: tuple[Path, ...]
    specs: InputSpecs
    batch_size: int
    options: ImageOptions
    channels: int
    channels_last: bool
    size: tuple[int, int]
    _held: dict[Path, NDArray[np.uint8]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, specs: InputSpecs, batch_size: int, limit: int | None, options: ImageOptions) -> Self:
        """Find the images and check that the model takes some.

        Raises:
            InputError: no images, or a model input that isn't one image a sample, or has no fixed size.
            MissingExtraError: Pillow isn't installed.
        """
        _pillow()
        options.moments()
        shape = specs[single_input(specs)][0]
        channels, last, size = _layout(shape, options)
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())[:limit]
        if not files:
            raise InputError(f"the folder {str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))})")
        fixed = batch_dimension(specs)
        if fixed is not None and len(files) % fixed:
            if len(files) < fixed:
                raise InputError(f"{path}: {len(files)} images, but the model takes batches of exactly {fixed}")
            warnings.warn(
                f"{path}: the model takes batches of exactly {fixed}; {len(files) % fixed} images are left out",
                stacklevel=4,
            )
            files = files[: len(files) - len(files) % fixed]
        return cls(tuple(files), specs, batch_size, options, channels, last, size)

    @property
    def samples(self) -> int:
        """Number of images."""
        return len(self.files)

    def __iter__(self) -> Iterator[Batch]:
        name = single_input(self.specs)
        for start in range(0, len(self.files), self.batch_size):
            part = self.files[start : start + self.batch_size]
            batch = np.stack([self._read(file) for file in part])
            yield check_batch({name: batch}, self.specs, str(part[0]))

    def fingerprint(self) -> str:
        """Hash of the files' contents, their order, and how they are read."""
        digest = hashlib.sha256(repr((self.options, self.batch_size, self.size)).encode())
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:32]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}

    def _read(self, file: Path) -> NDArray[Any]:
        pixels: NDArray[Any] = self._pixels(file)
        if np.dtype(self.specs[single_input(self.specs)][1]).kind == "f":
            mean, deviation = self.options.moments()
            pixels = (pixels - mean[: self.channels]) / deviation[: self.channels]
        if self.options.bgr:
            pixels = pixels[..., ::-1]
        return pixels if self.channels_last else np.moveaxis(pixels, -1, 0)

    def _pixels(self, file: Path) -> NDArray[np.uint8]:
        """Of an image in the model's size, (height, width, channels)."""
        if (held := self._held.get(file)) is not None:
            return held
        image = _pillow()
        height, width = self.size
        try:
            with image.open(file) as opened:
                _refuse_enormous(opened.size, self.size, self.options.fit, file.stat().st_size)
                picture = opened.convert("L" if self.channels == 1 else "RGB")
                if self.options.fit == "crop":
                    ratio = max(height / picture.height, width / picture.width)
                    scaled = (max(width, round(picture.width * ratio)), max(height, round(picture.height * ratio)))
                    picture = picture.resize(scaled, image.Resampling.BILINEAR)
                    x, y = (scaled[0] - width) // 2, (scaled[1] - height) // 2
                    picture = picture.crop((x, y, x + width, y + height))
                else:
                    picture = picture.resize((width, height), image.Resampling.BILINEAR)
                pixels = np.asarray(picture, np.uint8).reshape(height, width, self.channels)
        except Exception as error:  # Pillow's readers raise what damaged bytes lead them to
            raise InputError(f"can't read the image {str(file)!r}: {first_line(error)}") from None
        if len(self.files) * pixels.size <= HELD_BYTES:
            self._held[file] = pixels
        return pixels


def _refuse_enormous(given: tuple[int, int], wanted: tuple[int, int], fit: Fit, size: int) -> None:
    """Refuse small files that stand for enormous pictures, before anything is unpacked.

    Args:
        given: width and height by the file's own account.
        wanted: height and width of the model.
        fit: see `ImageOptions`.
        size: of the file, in bytes.

    Raises:
        InputError: it is one, or cropping would scale it to one.
    """
    width, height = given
    if width * height > max(_PIXELS, _PIXELS_A_BYTE * size):
        raise InputError(f"its {size:,} bytes unpack to {width:,} x {height:,} pixels")
    ratio = max(wanted[0] / max(height, 1), wanted[1] / max(width, 1))
    if fit == "crop" and width * height * ratio**2 > max(_PIXELS, width * height, 16 * wanted[0] * wanted[1]):
        raise InputError(
            f"it is too narrow to be cropped: {width:,} x {height:,} pixels; stretch it (ImageOptions(fit='stretch'), "
            "--image-fit stretch)"
        )


def _plain(value: object) -> object:
    given: object = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return tuple(_plain(v) for v in given) if isinstance(given, list | tuple) else given


def _scaling_text(scaling: str | tuple[Any, Any]) -> str:
    """A scaling as ``--image-scaling`` takes it."""
    if isinstance(scaling, str):
        return scaling
    return "/".join(",".join(f"{n:g}" for n in np.atleast_1d(np.asarray(part, np.float64))) for part in scaling)


def _layout(shape: tuple[int | None, ...], options: ImageOptions) -> tuple[int, bool, tuple[int, int]]:
    told = "[" + ", ".join("?" if n is None else str(n) for n in shape) + "]"
    if len(shape) != 4 or not ({shape[1], shape[3]} & {1, 3}):
        raise InputError(
            f"the model takes {told}, which is not images ([N, 1 or 3, H, W] or [N, H, W, 1 or 3]); give arrays"
        )
    last = shape[1] not in (1, 3)
    height, width = shape[1:3] if last else shape[2:4]
    if options.size is not None:
        if (height or options.size[0], width or options.size[1]) != options.size:
            raise InputError(
                f"the model takes {told}, and images of {options.size[0]} x {options.size[1]} are asked for: leave the "
                "size out"
            )
        height, width = options.size
    if height is None or width is None:
        raise InputError(
            f"the model takes {told}: it leaves the image size free; set ImageOptions(size=(height, width)), or "
            "--image-size HEIGHTxWIDTH"
        )
    return (shape[3] if last else shape[1]) or 3, last, (height, width)


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError('reading images needs Pillow: pip install "bitwright[images]"') from None
    return Image
