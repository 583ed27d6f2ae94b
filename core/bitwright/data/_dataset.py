"""Calibration and evaluation data: batches by input name, re-iterable, checked before any work, never held whole.

Accepted: arrays or a mapping of arrays (first axis is samples), a .npz or .npy path, a folder of images or of .npz
files, or any re-iterable of batches (a list, a DataLoader, a function that returns an iterator). Of models whose first
axes aren't samples (states, time first, scalars), data are whole feeds.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, array_of, class_indices
from bitwright.data._batches import (
    WAYS,
    InputSpecs,
    batch_dimension,
    check_batch,
    first_samples,
    in_names_of,
    is_feed,
    named_batch,
    one_run,
    opened_up,
    samples_in,
    single_input,
    stacked,
)
from bitwright.data._forward import Recording, needed_arguments
from bitwright.data._images import ImageFolder, ImageOptions, Images, is_image_folder
from bitwright.data._text import SUFFIXES as TEXT_SUFFIXES
from bitwright.data._text import TextOptions, text_rows
from bitwright.errors import InputError
from bitwright.files import Array, StoredArray, open_npy, open_npz, read_npy, read_npz

__all__ = [
    "ArrayDataset",
    "Dataset",
    "ImageOptions",
    "InputSpecs",
    "IterableDataset",
    "TextOptions",
    "labels",
    "open_data",
]


_NAMED = 8
"""Arrays that a message names."""
_CHECKS, _CHECKED_BYTES = 4096, 2**20
"""Samples are checked batch by batch; of very many, so many bytes at a time."""


@runtime_checkable
class Dataset(Protocol):
    """Batches that can be gone through again and again."""

    def __iter__(self) -> Iterator[Batch]:
        """Start over from the first batch."""

    @property
    def samples(self) -> int | None:
        """How many samples there are, where that is known beforehand."""

    def fingerprint(self) -> str:
        """Content hash: equal data in equal batches give equal fingerprints."""


@dataclass(frozen=True)
class ArrayDataset:
    """Arrays in memory (or in a file, read batch by batch), cut into batches.

    Attributes:
        arrays: by input name; the first axis is samples.
        batch_size: samples a batch; the last batch may have fewer.
        specs: what the model takes, to convert dtypes; None hands the arrays out as they are.
        drop_last: leave out a last batch that isn't full, for models with a fixed batch dimension.
    """

    arrays: Mapping[str, Array | StoredArray]
    batch_size: int
    specs: InputSpecs | None = None
    drop_last: bool = False

    @property
    def samples(self) -> int:
        """Samples that the batches hold."""
        length = len(next(iter(self.arrays.values())))
        return length - length % self.batch_size if self.drop_last else length

    def __iter__(self) -> Iterator[Batch]:
        for index, start in enumerate(range(0, self.samples, self.batch_size)):
            part = {k: np.ascontiguousarray(v[start : start + self.batch_size]) for k, v in self.arrays.items()}
            yield part if self.specs is None else check_batch(part, self.specs, f"batch {index}")

    def fingerprint(self) -> str:
        """Hash of names, dtypes, shapes, contents and batch size."""
        digest = hashlib.sha256(str(self.batch_size).encode())
        for name, values in sorted(self.arrays.items()):
            digest.update(f"{name}{values.dtype}{values.shape}".encode())
            for start in range(0, self.samples, 64):
                digest.update(np.ascontiguousarray(values[start : min(start + 64, self.samples)]).data)
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class IterableDataset:
    """Batches from the user's own re-iterable, checked one by one as they come.

    Attributes:
        start: begins a new pass.
        specs: what the model takes.
        count: samples, where the iterable told.
        limit: stop after so many samples.
        called: what messages call an item by its index.
    """

    start: Callable[[], Iterator[object]]
    specs: InputSpecs
    count: int | None = None
    limit: int | None = None
    called: Callable[[int], str] = "batch {}".format

    @property
    def samples(self) -> int | None:
        """Unknown unless the iterable told."""
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        left = self.limit
        fixed = batch_dimension(self.specs)
        for index, item in enumerate(self.start()):
            for part in _parts(item, self.specs, self.called(index), fixed):
                cut = part if left is None else first_samples(part, left)
                length = samples_in(cut)
                if left is not None and left <= 0:
                    return
                if length == 0 or (fixed is not None and length < fixed and not is_feed(cut, self.specs)):
                    return
                yield cut
                left = None if left is None else left - length

    def fingerprint(self) -> str:
        """Hash over one pass."""
        digest = hashlib.sha256()
        for batch in self:
            for name, values in sorted(batch.items()):
                digest.update(f"{name}{values.dtype}{values.shape}".encode())
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:32]


DataLike = (
    Dataset
    | str
    | Path
    | Images
    | NDArray[Any]
    | Mapping[str, object]
    | Iterable[object]
    | Callable[[], Iterable[object]]
)
"""What users give as data, see `open_data`."""


def open_data(
    source: DataLike,
    specs: InputSpecs,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    images: ImageOptions | None = None,
    text: TextOptions | None = None,
) -> Dataset:
    """Data in any accepted form, as batches that fit a model. Arrays and files are checked whole, before any work.

    - a mapping of arrays by input name (TensorFlow's "x:0" may be called "x"; "q.ids" is ``{"q": {"ids": …}}`` too), or
      one array for a model with one input; the first axis is samples;
    - a path to a .npz (array names are input names; any name for a model with one input) or a .npy: read batch
      by batch, unless an .npz is compressed; a file that changes while it is in use ends the run with an error;
    - a path to a folder of .npz files: each is a batch, or a whole feed; they are taken in the order of their names;
    - a path to a folder of images, scaled to the model's height and width (needs Pillow), or `Images`: such a path with
      how the files are read;
    - a path to a text file (.txt, .md), cut into rows of tokens by the tokenizer of `text` (needs tokenizers);
    - a list, a DataLoader or any other object that can be gone through repeatedly, or a function without arguments
      that returns a new iterator: each item is a batch, as a mapping, an array, or a tuple in the order of the
      model's inputs. Further elements of a tuple, such as labels, are left out; an argument that is a list or mapping
      of arrays, such as a detector's images, is given as one. The items' own sizes are kept.

    Where first axes aren't samples (`_batches.one_run`: an input is a scalar, or inputs fix different sizes; or lengths
    differ and some inputs fix theirs), each item or file is one whole feed and runs as it is; in a mapping or .npz,
    arrays stack the feeds along a new first axis, or are one feed. Any model's data may be stacked so.

    Where the model fixes the batch dimension, batches have that size and samples that don't fill the last one are
    left out, with a warning: padding them would count some values twice.

    Args:
        source: the data.
        specs: shape (None: free) and dtype of each model input.
        batch_size: samples a batch, for arrays, files and images.
        limit: use only the first so many samples.
        images: how image files become arrays.
        text: how text becomes tokens.

    Raises:
        InputError: the source is unusable (a one-shot iterator, an unknown file type), names, ranks, fixed dimensions
            or dtypes don't fit, lengths differ, or the data are empty or hold NaN or infinity; the message names the
            file, the array or the batch.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: a batch has at least one sample")
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}: use at least one sample")
    if not specs:
        raise InputError("the model has no inputs, so there is nothing to feed")
    if isinstance(source, Dataset):
        return source
    size = batch_dimension(specs) or batch_size
    if isinstance(source, Images):
        path = Path(source.path)
        if path.exists() and not is_image_folder(path):
            raise InputError(f"{str(path)!r} is no folder of images: give the path alone")
        return _open_path(path, specs, size, limit, source.options, text)
    if isinstance(source, str | Path):
        return _open_path(Path(source), specs, size, limit, images, text)
    if isinstance(source, Mapping):
        arrays = {str(k): array_of(v, f"array {k!r}") for k, v in opened_up(source, specs).items()}
        return _arrays(in_names_of(specs, arrays), specs, size, limit, "data")
    if isinstance(source, np.ndarray) or (hasattr(source, "__array__") and hasattr(source, "shape")):
        return _arrays({single_input(specs): array_of(source, "data")}, specs, size, limit, "data")
    if isinstance(source, Recording):
        return _iterable(source, specs, limit, "call {} of the model".format)
    return _iterable(source, specs, limit)


def _open_path(
    path: Path,
    specs: InputSpecs,
    size: int,
    limit: int | None,
    images: ImageOptions | None,
    text: TextOptions | None,
) -> Dataset:
    if not path.exists():
        raise InputError(f"there is no file or folder {str(path)!r}")
    if path.is_dir():
        if files := sorted(path.glob("*.npz")):
            return _iterable(NpzFolder(tuple(files), specs), specs, limit, lambda i: str(files[i]))
        return ImageFolder.open(path, specs, size, limit, images or ImageOptions())
    if path.suffix == ".npy":
        return _arrays({single_input(specs): open_npy(path)}, specs, size, limit, str(path))
    if path.suffix == ".npz":
        arrays = open_npz(path)
        if len(arrays) == len(specs) == 1:
            arrays = dict(zip(specs, arrays.values(), strict=True))
        return _arrays(in_names_of(specs, arrays), specs, size, limit, str(path))
    if path.suffix.lower() in TEXT_SUFFIXES:
        return _arrays(text_rows(path, specs, text or TextOptions()), specs, size, limit, str(path))
    raise InputError(
        f"can't read {str(path)!r} as data: give a .npz, a .npy, a .txt, or a folder of images or .npz files"
    )


@dataclass(frozen=True)
class NpzFolder:
    """A folder with one .npz a batch, or a feed; read as it is gone through.

    Attributes:
        files: in their order.
        specs: of the model's inputs; any array name will do for a single one.
    """

    files: tuple[Path, ...]
    specs: InputSpecs

    def __iter__(self) -> Iterator[Mapping[str, Array | StoredArray]]:
        for file in self.files:
            arrays = in_names_of(self.specs, open_npz(file))
            missing = [n for n in self.specs if n not in arrays]
            if missing and len(arrays) == len(self.specs) == 1:
                arrays = dict(zip(self.specs, arrays.values(), strict=True))
            elif missing:
                raise InputError(
                    f"{file}: no array for input {missing[0]!r}; it holds {', '.join(arrays) or 'nothing'}, the "
                    f"model's inputs are {', '.join(map(repr, self.specs))}"
                )
            yield arrays


def _feeds(arrays: Mapping[str, Any], specs: InputSpecs, limit: int | None, where: str) -> IterableDataset | None:
    """Arrays as whole feeds, where they stack them or are one; None where the first axis is samples."""
    feeds = stacked(arrays, specs, where)
    if feeds is None and not is_feed(arrays, specs):
        return None
    if feeds is None:
        return _iterable([arrays], specs, limit, lambda i: where)
    return _iterable(feeds, specs, limit, lambda i: f"{where}, feed {i}")


def _arrays(arrays: Mapping[str, Any], specs: InputSpecs, size: int, limit: int | None, where: str) -> Dataset:
    missing, extra = [n for n in specs if n not in arrays], [n for n in arrays if n not in specs]
    if missing or extra:
        told = [f"no array for input {n!r}" for n in missing]
        told += [f"array {n!r} is not an input of the model" for n in extra[:_NAMED]]
        told += [f"nor are {len(extra) - _NAMED} more"] if len(extra) > _NAMED else []
        raise InputError(f"{where}: {'; '.join(told)}; the model's inputs are {', '.join(map(repr, specs))}")
    if (feeds := _feeds(arrays, specs, limit, where)) is not None:
        return feeds
    for name, values in arrays.items():
        if values.ndim == 0:
            raise InputError(f"{where}: array {name!r} is a scalar; the first axis is samples")
    if len(lengths := {len(a) for a in arrays.values()}) > 1:
        told = [f"{name!r} {len(values)}" for name, values in arrays.items()]
        raise InputError(
            f"{where}: the arrays hold different numbers of samples: {', '.join(told)}; where axis 0 isn't samples, "
            f"give whole feeds: {WAYS}"
        )
    (length,) = lengths
    if length == 0:
        raise InputError(f"{where}: the data are empty (no samples)")
    length = min(length, limit or length)
    fixed = batch_dimension(specs)
    if fixed is not None and length % fixed:
        if length < fixed:
            raise InputError(f"{where}: {length} samples, but the model takes batches of exactly {fixed}")
        warnings.warn(
            f"{where}: the model takes batches of exactly {fixed}; the last {length % fixed} of {length} samples "
            "are left out",
            stacklevel=4,
        )
    dataset = ArrayDataset({n: arrays[n][:length] for n in specs}, size, specs, drop_last=fixed is not None)
    width = sum(a.size // len(a) * a.dtype.itemsize for a in dataset.arrays.values())
    step = max(size, min(length // _CHECKS, _CHECKED_BYTES // max(width, 1)))
    for start in range(0, length, step):
        part = {n: np.asarray(a[start : start + step]) for n, a in dataset.arrays.items()}
        check_batch(part, specs, where, any_length=True, first_sample=start)
    return dataset


def _iterable(
    source: object, specs: InputSpecs, limit: int | None, called: Callable[[int], str] = "batch {}".format
) -> IterableDataset:
    count: int | None = None
    start: Callable[[], Iterator[object]]
    if hasattr(source, "__next__"):
        raise InputError(
            f"a {type(source).__name__} can be gone through only once, but calibration passes over the data several "
            "times; give a list, a DataLoader, or a function that returns a new iterator each time"
        )
    if isinstance(source, Iterable):
        start = source.__iter__
    elif callable(source):
        if (needed := needed_arguments(source)) > 1:
            raise InputError(
                f"the function {getattr(source, '__name__', source)!r} needs {needed} arguments; give one without "
                "arguments that returns an iterator, or one that takes the model and runs it: "
                "lambda model: forward(model, …)"
            )
        start = _fresh(source)
    else:
        raise InputError(
            f"can't read data from a {type(source).__name__}; give arrays, a path, a list of batches, a DataLoader, "
            "or a function that returns an iterator"
        )
    if isinstance(source, list | tuple | NpzFolder | Recording):
        fixed = batch_dimension(specs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when they are gone through
            parts = (p for i, item in enumerate(source) for p in _parts(item, specs, called(i), fixed))
            count = sum(samples_in(part) for part in parts)
        count = min(count, limit or count)
        if fixed and not one_run(specs):
            count -= count % fixed
    dataset = IterableDataset(start, specs, count, limit, called)
    if next(islice(iter(dataset), 1), None) is None:
        raise InputError("the data are empty (no full batch)")
    return dataset


def _fresh(function: Callable[[], Any]) -> Callable[[], Iterator[object]]:
    given: list[object] = []

    def start() -> Iterator[object]:
        iterator: Iterator[object] = iter(function())
        if any(iterator is g for g in given):
            raise InputError("the data function returned the same iterator twice; it must make a new one on each call")
        # The last one is kept alive, since the identity of a freed object may come again.
        given[:] = [iterator]
        return iterator

    return start


def _parts(item: object, specs: InputSpecs, where: str, fixed: int | None) -> Iterator[Batch]:
    """What an item of an iterable is to the model: a batch, pieces of the size that the model fixes, or whole feeds."""
    named = named_batch(item, specs, where)
    feeds = stacked(named, specs, where)
    for number, batch in enumerate([named] if feeds is None else feeds):
        place = where if feeds is None else f"{where}, feed {number}"
        whole = is_feed(batch, specs)
        checked = check_batch(batch, specs, place, any_length=fixed is not None and feeds is None, whole=whole)
        yield from [checked] if whole else _pieces(checked, fixed)


def _pieces(batch: Batch, size: int | None) -> Iterator[Batch]:
    if size is None:
        yield batch
        return
    length = samples_in(batch)
    if length % size:
        warnings.warn(
            f"the model takes batches of exactly {size}; {length % size} samples of a batch of {length} are left out",
            stacklevel=3,
        )
    for start in range(0, length - length % size, size):
        yield {k: np.ascontiguousarray(v[start : start + size]) for k, v in batch.items()}


def labels(path: str | Path) -> NDArray[np.int64]:
    """Class indices from a .npy, an .npz with one array, or a text file with one integer a line.

    Raises:
        InputError: the file can't be read, or doesn't hold what `backend.class_indices` takes.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no labels file {str(path)!r}")
    if path.suffix == ".npz":
        arrays = read_npz(path)
        if len(arrays) != 1:
            raise InputError(f"{path}: labels are one array, this file holds {', '.join(arrays) or 'none'}")
        values = next(iter(arrays.values()))
    elif path.suffix == ".npy":
        values = read_npy(path)
    else:
        try:
            values = np.array([int(line) for line in path.read_text().split()], np.int64)
        except (ValueError, OverflowError):
            raise InputError(f"{path}: labels are a .npy file, or text with one integer a line") from None
    if values.size == 0:
        raise InputError(f"{path}: the file holds no labels, shape {values.shape}")
    return class_indices(values, str(path))
