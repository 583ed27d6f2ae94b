"""Arrays from .npy and .npz files: read by calls, at once or piece by piece, and never unpickled or memory-mapped."""

from __future__ import annotations

import lzma
import math
import sys
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError, first_line
from bitwright.files._pieces import StoredArray, stored

Array = NDArray[Any]
"""A numpy array of any type."""
DAMAGED = (
    OSError, ValueError, EOFError, LookupError, TypeError, SyntaxError, OverflowError, MemoryError, RuntimeError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
"""What reading damaged array files raises: numpy evaluates headers as Python literals, zip entries name any method."""
_UNPACKED_BYTES = 2**26
_UNPACKED_TIMES = 20
"""The compressed arrays of a file may take this many bytes, or this many times those of the file."""
_AXES = 32
_VERSIONS = ((1, 0), (2, 0), (3, 0))
_LAST_CHARACTER = sys.maxunicode
_LOCAL_HEADER = 30
"""Bytes of a zip entry's local header before its name; the last four are the lengths of name and extra field."""


def read_npy(path: Path) -> Array:
    """The array of a .npy file.

    Raises:
        InputError: it is no .npy file, is truncated, or holds objects.
    """
    return np.asarray(open_npy(path))


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a .npz file.

    Raises:
        InputError: it is no .npz file, is truncated, or holds objects.
    """
    return {name: np.asarray(values) for name, values in open_npz(path).items()}


def open_npy(path: Path) -> Array | StoredArray:
    """A .npy file that is read piece by piece (in Fortran order: at once).

    Raises:
        InputError: as `read_npy`; and when it is read, if the file has changed.
    """
    try:
        with path.open("rb") as file:
            return _piecewise(path, file, 0, path.stat().st_size)
    except DAMAGED as error:
        raise InputError(f"can't read {str(path)!r}: {_reason(error)}") from None


def open_npz(path: Path) -> dict[str, Array | StoredArray]:
    """The arrays of a .npz file, read piece by piece; compressed ones, and those in Fortran order, at once.

    Raises:
        InputError: as `read_npz`; compressed arrays take far more than the file; and when they are read, if the file
            has changed.
    """
    arrays: dict[str, Array | StoredArray] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            unpacked, size = sum(entry.file_size for entry in packed), path.stat().st_size
            if unpacked > max(_UNPACKED_BYTES, _UNPACKED_TIMES * size):
                raise InputError(
                    f"can't read {str(path)!r}: its {size / 2**20:,.1f} MiB unpack to {unpacked / 2**20:,.0f} MiB; "
                    "write it by numpy.savez, uncompressed, and it is read piece by piece"
                )
            if sum(entry.compress_size for entry in archive.infolist()) > size:
                raise ValueError("its entries overlap")
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if entry.compress_type == zipfile.ZIP_STORED:
                    arrays[name] = _piecewise(path, file, _start(file, entry), entry.file_size)
                else:
                    with archive.open(entry) as member:
                        arrays[name] = _texts(np.asanyarray(np.lib.format.read_array(member, allow_pickle=False)))
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"can't read {str(path)!r}: {_reason(error)}") from None
    return arrays


def _start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored zip entry begin."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER:
        raise ValueError("the file is truncated")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return entry.header_offset + _LOCAL_HEADER + lengths


def _piecewise(path: Path, file: BinaryIO, start: int, size: int) -> Array | StoredArray:
    """The array of a .npy stream of `size` bytes that begins at `start`, to be read piece by piece."""
    shape, fortran, dtype, offset = _header(file, start, size)
    if dtype.kind == "U":
        texts = _texts(np.asarray(stored(path, file.fileno(), offset, shape[::-1] if fortran else shape, dtype)))
        return texts.T if fortran else texts
    if not fortran:
        return stored(path, file.fileno(), offset, shape, dtype)
    return np.asarray(stored(path, file.fileno(), offset, shape[::-1], dtype)).T


def _texts(values: Array) -> Array:
    """An array as it is; of texts, once each character is one that Unicode has.

    numpy makes texts of any numbers, and Python's functions on them fail then in ways of their own (SystemError).

    Raises:
        ValueError: one isn't.
    """
    if values.dtype.kind == "U" and values.dtype.itemsize:
        codes = np.ascontiguousarray(values).reshape(-1).view(np.dtype(np.uint32).newbyteorder(values.dtype.byteorder))
        if codes.size and codes.max() > _LAST_CHARACTER:
            raise ValueError(f"its texts hold the character {int(codes.max()):#x}, and Unicode has none after 0x10ffff")
    return values


def _header(file: BinaryIO, start: int, size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran order, type, and where the values begin, of a .npy stream."""
    file.seek(start)
    version = np.lib.format.read_magic(file)
    if version not in _VERSIONS:
        raise ValueError(f"its format has the version {version[0]}.{version[1]}, which isn't known")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if dtype.subdtype is not None:  # each value is an array of its own, and the shape isn't that of what is read
        raise ValueError(f"its type is {dtype.str}, of arrays")
    if any(isinstance(n, bool) or n < 0 for n in shape):
        raise ValueError(f"its shape is {shape}")
    if len(shape) > _AXES:
        raise ValueError(f"it has {len(shape)} axes")
    offset = file.tell()
    if offset - start + math.prod(shape) * dtype.itemsize > size:
        raise ValueError("the file is truncated")
    np.broadcast_to(np.empty((), dtype), shape)  # an error where numpy has no such array: 65 axes, or (0, 2**63)
    return shape, fortran, dtype, offset


def _reason(error: Exception) -> str:
    text = first_line(error)
    if "objects" in text or "object arrays" in text.lower():
        return "it holds Python objects, which are not loaded; save plain numeric arrays with numpy.savez"
    return f"{text}; expected a file written by numpy.save or numpy.savez"
