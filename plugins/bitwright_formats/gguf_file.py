"""GGUF files, version 3: a header of keys and tensors, and aligned data (ggml's docs/gguf.md)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright.files import atomic_write

Array = NDArray[Any]
Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
ALIGNMENT, BLOCK = 32, 32
TYPES: Mapping[str, tuple[int, int, int]] = {
    # name: (number, columns of a block, bytes of a block)
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, BLOCK, 18),
    "Q4_1": (3, BLOCK, 20),
    "Q8_0": (8, BLOCK, 34),
    "BF16": (30, 1, 2),
    "MXFP4": (39, BLOCK, 17),
}
_KEYS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
_STRING, _ARRAY, _INT32 = 8, 9, 5
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that is to be written: bytes (rows, bytes of a row), made when it is its turn."""

    name: str
    type: str
    shape: tuple[int, ...]
    make: Callable[[], NDArray[np.uint8]]

    @property
    def size(self) -> int:
        """Bytes of the data."""
        _, columns, length = TYPES[self.type]
        return prod(self.shape) // columns * length


def write_gguf(path: Path, keys: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> Path:
    """Write a file; one tensor is in memory at a time.

    Raises:
        WriteError: it can't be written.
    """
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    for key, value in keys.items():
        head += _text(key) + _value(value)
    offset = 0
    for t in tensors:
        head += _text(t.name) + struct.pack("<I", len(t.shape))
        head += struct.pack(f"<{len(t.shape)}Q", *reversed(t.shape))  # ggml counts from the axis that runs fastest
        head += struct.pack("<IQ", TYPES[t.type][0], offset)
        offset += _aligned(t.size)
    with atomic_write(path) as file:
        file.write(head + b"\0" * (_aligned(len(head)) - len(head)))
        for t in tensors:
            data = t.make().tobytes()
            assert len(data) == t.size, (t.name, len(data), t.size)
            file.write(data + b"\0" * (_aligned(len(data)) - len(data)))
    return path


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool | int | float):
        number, layout = _KEYS[type(value)]
        return struct.pack("<I", number) + struct.pack(layout, value)
    if all(isinstance(v, str) for v in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_text(str(v)) for v in value)
    kind, layout = (_INT32, "<i4") if all(isinstance(v, int) for v in value) else (6, "<f4")
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + np.asarray(value, layout).tobytes()


@dataclass(frozen=True)
class GgufFile:
    """An open file.

    Attributes:
        path: the file.
        keys: its metadata.
        tensors: name → type, shape, and where the data begin.
    """

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read keys and tensors' places.

        Raises:
            InputError: it isn't such a file.
        """
        try:
            with path.open("rb") as file:
                return _opened(path, file)
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise InputError(f"{path} can't be read as GGUF: {error}") from error

    def rows(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, (rows, bytes of a row)."""
        kind, shape, begin = self.tensors[name]
        _, columns, length = TYPES[kind]
        row = shape[-1] // columns * length
        with self.path.open("rb") as file:
            file.seek(begin)
            return np.frombuffer(file.read(prod(shape[:-1]) * row), np.uint8).reshape(-1, row)


def _opened(path: Path, file: BinaryIO) -> GgufFile:
    def number(layout: str) -> Any:
        return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]

    def text() -> str:
        return file.read(number("<Q")).decode()

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind == _ARRAY:
            inner, count = number("<I"), number("<Q")
            return [value(inner) for _ in range(count)]
        return number(_FORMATS[kind])

    if file.read(4) != b"GGUF" or number("<I") != 3:
        raise ValueError("it isn't a GGUF file of version 3")
    tensors, keys = number("<Q"), number("<Q")
    found = {text(): value(number("<I")) for _ in range(keys)}
    names = {t[0]: name for name, t in TYPES.items()}
    placed: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name, axes = text(), number("<I")
        shape = tuple(number("<Q") for _ in range(axes))[::-1]
        placed[name] = names[number("<I")], shape, number("<Q")
    begin = _aligned(file.tell())
    return GgufFile(path, found, {name: (kind, shape, begin + at) for name, (kind, shape, at) in placed.items()})
