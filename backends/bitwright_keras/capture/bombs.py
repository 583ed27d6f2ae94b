"""Model files that are small and stand for something enormous: found before memory or time is spent on them."""

from __future__ import annotations

import io
import math
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import keras

from bitwright.errors import InputError, ModelError
from bitwright_keras.capture.tracing import Recording, functional_of, recorded
from bitwright_keras.graph.model import KerasModel

_BYTES, _TIMES = 2**24, 20
"""What a file holds may unpack to so many bytes, or to so many times its own."""
_CALLS, _TIMES_WRITTEN = 2_000, 100
"""So many calls may a model have with its nested models written out, or so many times those that it states."""
_COMPARED_BYTES, _TIMES_WEIGHTS = 2**27, 64
"""What a trial run of a file's model may compute, or so many times its weights."""
_WEIGHTS = "model.weights"
_HEAP, _OBJECT, _PIECE = b"GCOL\1\0\0\0", 16, 2**20
"""How a global heap of an HDF5 file begins, with its version; bytes of an object's header; bytes read at once."""
_LOADING = threading.Lock()


@contextmanager
def bounded_loading(path: Path) -> Iterator[None]:
    """While the block runs, Keras may open a file: it is looked at first, and layers get no more weights than it has.

    Raises:
        InputError: the file unpacks to far more than its own size, or its layers ask for far more weights than it
            holds.
    """
    size = path.stat().st_size
    held = _weights_of(path, size)
    most = _BYTES + 4 * held
    own, made = threading.get_ident(), 0
    add_weight = keras.layers.Layer.add_weight

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if threading.get_ident() == own:
            made += 4 * _product(kwargs.get("shape") or (args[0] if args else ()))
            if made > most:
                raise MemoryError("the layers' weights")
        return add_weight(layer, *args, **kwargs)

    with _LOADING:
        keras.layers.Layer.add_weight = counted
        try:
            yield
        except Exception as error:
            if made <= most:
                raise
            raise InputError(
                f"{path} can't be opened: its layers ask for {made / 2**20:,.0f} MiB of weights, and the file holds "
                f"{held / 2**20:,.1f}"
            ) from error
        finally:
            keras.layers.Layer.add_weight = add_weight


def _weights_of(path: Path, size: int) -> int:
    """Bytes of the weights in a file, by its own account; 0 where it isn't one.

    Raises:
        InputError: they, or the members of the archive, are far larger than the file; or a heap never ends.
    """
    most = max(_BYTES, _TIMES * size)
    held = 0
    # What else is wrong with it, Keras says.
    wrong = (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError, KeyError, ValueError)
    try:
        with path.open("rb") as file:
            held = _in_archive(file, most) if path.suffix == ".keras" else _in_h5(file)
    except InputError as error:
        raise InputError(f"{path} can't be opened: {error}") from None
    except wrong:
        pass
    if held > most:
        raise InputError(
            f"{path} can't be opened: its {size / 2**20:,.1f} MiB unpack to {held / 2**20:,.0f} MiB or more"
        )
    return held


def _in_archive(file: BinaryIO, most: int) -> int:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if (unpacked := sum(entry.file_size for entry in entries)) > most:
            return unpacked
        held = 0
        for entry in entries:
            if entry.filename in (f"{_WEIGHTS}.h5", f"{_WEIGHTS}.npz"):
                with _member(archive, entry) as member:
                    held += _in_h5(member) if entry.filename.endswith(".h5") else _in_npz(member)
        return held


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> BinaryIO:
    """A member to seek in: where it lies, or unpacked."""
    if entry.compress_type != zipfile.ZIP_STORED or archive.fp is None:
        return io.BytesIO(archive.read(entry))
    archive.open(entry).close()  # its headers agree
    archive.fp.seek(entry.header_offset + 26)
    lengths = archive.fp.read(4)
    start = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return io.BufferedReader(_Window(archive.fp, start, entry.file_size))


def _in_h5(file: BinaryIO) -> int:
    import h5py

    found: list[int] = []

    def take(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(math.prod(item.shape or ()) * item.dtype.itemsize)

    _check_heaps(file)
    with h5py.File(file, "r") as opened:
        opened.visititems(take)  # each object once, and no links to elsewhere
    return sum(found)


def _check_heaps(file: BinaryIO) -> None:
    """See that each global heap of an HDF5 file, which holds texts of any length, can be gone through.

    The HDF5 library goes from object to object by their sizes, and never ends where one has none (HDF5 File Format
    Specification 3.0, III.E). The file is left at its beginning.

    Raises:
        InputError: one can't be.
    """
    start, before = 0, b""
    file.seek(0)
    while piece := file.read(_PIECE):
        held = before + piece
        at = held.find(_HEAP)
        while at >= 0:
            here = file.tell()
            _check_heap(file, start - len(before) + at)
            file.seek(here)
            at = held.find(_HEAP, at + 1)
        start, before = start + len(piece), held[-(len(_HEAP) - 1) :]
    file.seek(0)


def _check_heap(file: BinaryIO, start: int) -> None:
    file.seek(start + len(_HEAP))
    size = int.from_bytes(file.read(8), "little")
    at, end = _OBJECT, size
    while at + _OBJECT <= end:
        file.seek(start + at)
        header = file.read(_OBJECT)
        held = int.from_bytes(header[8:], "little")
        free = header[:2] == b"\0\0"  # the space that is left, whose size counts its header
        step = held if free else _OBJECT + -(-held // 8) * 8
        if len(header) < _OBJECT or step < _OBJECT or at + step > end:
            raise InputError(f"its texts are damaged: an object of {held:,} bytes at {start + at:,}")
        at += step


def _in_npz(file: BinaryIO) -> int:
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist())


class _Window(io.RawIOBase):
    """A part of an open file as a file."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place of the part."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, into: Any) -> int:
        """Fill a buffer, as far as the part goes."""
        view = memoryview(into).cast("B")
        count = max(min(len(view), self._size - self._at), 0)
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


# -- models


def check_written_out(recording: Recording) -> None:
    """See that models in models, written out, stay a network of a size that can be worked with.

    Raises:
        ModelError: the network would have too many calls.
    """
    sizes: dict[int, int] = {}
    written = 0

    def size(inside: Recording) -> int:
        nonlocal written
        written += len(inside.calls)
        return sum(1 + nested(call.operation) for call in inside.calls)

    def nested(operation: Any) -> int:
        functional = functional_of(operation) if isinstance(operation, keras.Model) else None
        if functional is None:
            return 0
        if id(operation) not in sizes:
            sizes[id(operation)] = size(recorded(functional))
        return sizes[id(operation)]

    total = size(recording)
    if total > (most := max(_CALLS, _TIMES_WRITTEN * written)):
        raise ModelError(
            f"with its nested models written out the model makes {total:,} calls; {most:,} are possible for the "
            f"{written:,} that it states"
        )


def too_large_to_try(model: KerasModel, variables: Iterable[Any]) -> bool:
    """Whether running a model of a file on two samples would take far more memory than its weights.

    Args:
        model: in normal form.
        variables: its weights.
    """
    values = sum(_product(n or (2 if i == 0 else 8) for i, n in enumerate(s.shape)) for s in model.specs.values())
    weights = sum(_product(v.shape) for v in variables)
    return 4 * values > max(_COMPARED_BYTES, _TIMES_WEIGHTS * 4 * weights)


def _product(shape: Any) -> int:
    try:
        return math.prod(int(n) for n in ((shape,) if isinstance(shape, int) else shape))
    except (TypeError, ValueError):  # no shape: Keras says so
        return 0
