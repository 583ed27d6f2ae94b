"""What HDF5 files hold: how large they are, and whether the library can read them at all.

The HDF5 library is C, and takes a file at its word: damage can end the process. So files are read by this module run as
a program first (`trial_reading` starts it), which needs nothing but h5py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

WEIGHTS = "model.weights"
_CONFIG, _CONFIG_IN_H5 = "config.json", "model_config"
_GEOMETRY = {
    "axis", "cropping", "dilation_rate", "kernel_size", "output_padding", "padding", "pool_size", "size", "strides",
}  # fmt: skip
_LARGEST = 2**31 - 1
"""These settings become attributes of ops, of 32 bits; TensorFlow ends the process over one that doesn't fit."""
_HEAP, _OBJECT, _PIECE = b"GCOL\1\0\0\0", 16, 2**20
"""How a global heap of an HDF5 file begins, with its version; bytes of an object's header; bytes read at once."""
_DEPTH = 100
"""So deep may groups lie in groups."""
_SPARE_BYTES, _TIMES_HELD = 2**27, 4
"""What the program may take beside the file, and how often what that may hold: packed, unpacked and as values."""
_WRONG = (OSError, RuntimeError, KeyError, ValueError, TypeError, NotImplementedError)
"""What h5py raises over an object that can't be read."""


class Refused(ValueError):
    """A file that isn't to be opened, and why."""


def weight_bytes(path: Path, most: int) -> int:
    """Bytes of the weights in a .keras, .h5 or .hdf5 file, by its own account; all that reading it takes was done.

    Args:
        path: the file.
        most: with more than so many, nothing is read.

    Raises:
        Refused: a heap never ends, values lie in other files, or a layer has a setting that no op can have.
        Exception: whatever h5py and zipfile raise over what isn't such a file.
    """
    with path.open("rb") as file:
        return _in_archive(file, most) if path.suffix == ".keras" else _in_h5(file, most)


def _in_archive(file: BinaryIO, most: int) -> int:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if (unpacked := sum(entry.file_size for entry in entries)) > most:
            return unpacked
        held = 0
        for entry in entries:
            if entry.filename == _CONFIG:
                _check_settings(archive.read(entry))
            if entry.filename in (f"{WEIGHTS}.h5", f"{WEIGHTS}.npz"):
                with _member(archive, entry) as member:
                    held += _in_h5(member, most) if entry.filename.endswith(".h5") else _in_npz(member)
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


def _in_npz(file: BinaryIO) -> int:
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _in_h5(file: BinaryIO, most: int) -> int:
    import h5py

    _check_heaps(file)
    try:
        opened = h5py.File(file, "r")
    except _WRONG as error:  # of what, nobody can tell: for want of memory, which Keras would take
        raise Refused(f"the HDF5 library can't open it: {error}") from error
    with opened:
        with _telling_want():
            config = opened.attrs.get(_CONFIG_IN_H5, "null")
        _check_settings(config)
        objects = list(_objects(opened, h5py))
        sets = [found for found in objects if isinstance(found, h5py.Dataset)]
        held = sum(map(_size, sets))
        if held <= most:
            for found in objects:
                _tried(found)
    return held


def _size(found: Any) -> int:
    """Bytes that reading a data set takes: a piece may be larger than the set, and is unpacked as a whole."""
    with _passing_over():  # as of a type that numpy doesn't have
        values = max(math.prod(found.shape or ()), math.prod(found.chunks or ()))
        return int(values) * int(found.dtype.itemsize)
    return 0


def _tried(found: Any) -> None:
    """Read an object; what comes behind it is tried all the same."""
    import h5py

    with _passing_over():
        list(found.attrs.items())
    with _passing_over():
        if isinstance(found, h5py.Dataset):
            _read(found)


def _objects(opened: Any, h5py: Any) -> Iterator[Any]:
    """Groups and data sets, each once.

    Raises:
        Refused: a link or values lead to other files, or nobody can tell; or groups lie too deep.
    """
    seen: set[Any] = set()
    waiting = [(opened, 0)]
    while waiting:
        found, depth = waiting.pop()
        try:
            address = h5py.h5o.get_info(found.id).addr
            elsewhere = isinstance(found, h5py.Dataset) and (found.external or found.is_virtual)
        except _WRONG as error:  # it was opened, so Keras may read it, and what is behind it wasn't looked at
            raise Refused(f"{found.name!r} is damaged: {error}") from error
        if address in seen:
            continue
        seen.add(address)
        yield found
        if isinstance(found, h5py.Dataset):
            if elsewhere:
                raise Refused(f"the values of {found.name!r} lie in other files")
        elif isinstance(found, h5py.Group):
            if depth > _DEPTH:
                raise Refused("its groups lie too deep in one another")
            for name, link in _links(found):
                if isinstance(link, h5py.ExternalLink):
                    raise Refused(f"{name!r} lies in another file")
                if isinstance(link, h5py.HardLink):
                    with _passing_over():
                        waiting.append((found[name], depth + 1))


def _links(group: Any) -> Iterator[tuple[str, Any]]:
    names: list[str] = []
    links: list[tuple[str, Any]] = []
    with _passing_over():
        names += group
    for name in names:
        with _passing_over():  # as of a link of somebody's own kind
            links.append((name, group.get(name, getlink=True)))
    yield from links


@contextlib.contextmanager
def _passing_over() -> Iterator[None]:
    """Go on after what h5py can't read: Keras says so if it reads it too.

    Raises:
        MemoryError: it couldn't for want of memory, and Keras would read it without a limit.
    """
    with contextlib.suppress(*_WRONG), _telling_want():
        yield


@contextlib.contextmanager
def _telling_want() -> Iterator[None]:
    """Tell want of memory from damage: h5py raises the same over both.

    Raises:
        MemoryError: the HDF5 library asked for memory and got none.
    """
    last = _last_error()
    last.value = 0
    try:
        yield
    except _WRONG as error:
        if last.value == errno.ENOMEM:
            raise MemoryError from error
        raise


def _last_error() -> ctypes.c_int:
    """C's errno, which ctypes hides; on systems that call it otherwise, and limit no memory, one that is always 0."""
    place = getattr(ctypes.pythonapi, "__errno_location", None)
    if place is None:
        return ctypes.c_int(0)
    place.restype = ctypes.POINTER(ctypes.c_int)
    found: ctypes.c_int = place().contents
    return found


def _read(found: Any) -> None:
    """Read what takes more than copying bytes: texts, and values in packed pieces."""
    if found.chunks is not None:
        for piece in found.iter_chunks():
            found[piece]
    elif found.dtype.hasobject or found.dtype.names is not None or not found.shape:
        found[()]


def _check_settings(config: Any) -> None:
    """See that the geometry that a network's description gives its layers is one that ops have.

    Raises:
        Refused: one isn't.
    """
    waiting = [("", "", json.loads(config))]
    while waiting:
        layer, name, value = waiting.pop()
        if isinstance(value, dict):
            called = value.get("name")
            layer = called if isinstance(called, str) else layer
            waiting += [(layer, key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(layer, name, inner) for inner in value]
        elif name in _GEOMETRY and isinstance(value, int) and abs(value) > _LARGEST:
            raise Refused(f"the setting {name!r} of {layer!r} is {value}, more than 32 bits hold")


def _check_heaps(file: BinaryIO) -> None:
    """See that each global heap of an HDF5 file, which holds texts of any length, can be gone through.

    The HDF5 library goes from object to object by their sizes, and never ends where one has none (HDF5 File Format
    Specification 3.0, III.E). The file is left at its beginning.

    Raises:
        Refused: one can't be.
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
            raise Refused(f"its texts are damaged: an object of {held:,} bytes at {start + at:,}")
        at += step


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


# -- as a program


def answer(path: Path, most: int) -> dict[str, Any]:
    """What `weight_bytes` gives, as {"held": bytes}, {"refused": why} or {"failed": why}."""
    with contextlib.suppress(ImportError):
        import h5py  # noqa: F401 - what that takes isn't the file's
    try:
        with _limited(path.stat().st_size + _TIMES_HELD * most):
            return {"held": weight_bytes(path, most)}
    except Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": "reading it takes far more memory than it has bytes"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


class _limited:
    """While the block runs, the process takes no more memory than files may need, where the system can tell."""

    def __init__(self, spare: int) -> None:
        self._spare = spare

    def __enter__(self) -> None:
        self._before: tuple[int, int] | None = None
        try:
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
        except (ImportError, OSError):
            return
        self._before = before = resource.getrlimit(resource.RLIMIT_AS)
        most = pages * resource.getpagesize() + _SPARE_BYTES + self._spare
        if before[1] == resource.RLIM_INFINITY or most < before[1]:
            resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, self._before)


def serve() -> None:
    """Answer each line [path, most] of standard input by a line of standard output, until it ends."""
    for line in sys.stdin:
        path, most = json.loads(line)
        sys.stdout.write(json.dumps(answer(Path(path), most)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
