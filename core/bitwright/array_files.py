"""Arrays from .npy and .npz files: memory-mapped where the file allows it, never unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bitwright.backend import Array
from bitwright.errors import InputError

_LOCAL_HEADER = 30
"""Bytes of a zip entry's local header before its name; the last four are the lengths of name and extra field."""


def read_npy(path: Path) -> Array:
    """A memory-mapped .npy file.

    Raises:
        InputError: it is no .npy file, is truncated, or holds objects.
    """
    try:
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"can't read {str(path)!r}: {_reason(error)}") from None


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a .npz file; memory-mapped, but for compressed ones, which are read whole.

    Raises:
        InputError: it is no .npz file, is truncated, or holds objects.
    """
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if entry.compress_type == zipfile.ZIP_STORED:
                    arrays[name] = _mapped(path, file, entry)
                else:
                    with archive.open(entry) as member:
                        arrays[name] = np.asanyarray(np.lib.format.read_array(member, allow_pickle=False))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"can't read {str(path)!r}: {_reason(error)}") from None
    return arrays


def _mapped(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> Array:
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER:
        raise ValueError("truncated file")
    start = entry.header_offset + _LOCAL_HEADER
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    file.seek(start)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"array {entry.filename!r} holds Python objects")
    offset = file.tell()
    if offset - start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize > entry.file_size:
        raise ValueError(f"array {entry.filename!r} is truncated")
    if 0 in shape:
        return np.empty(shape, dtype)
    order = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", offset, shape, order)  # type: ignore[call-overload,no-any-return]


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "pickle" in text.lower() or "object" in text.lower():
        return "it holds Python objects, which are not loaded; save plain numeric arrays with numpy.savez"
    return f"{text}; expected a file written by numpy.save or numpy.savez"
