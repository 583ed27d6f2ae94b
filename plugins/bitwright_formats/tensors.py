"""Safetensors files, written tensor by tensor, and read by parts (https://huggingface.co/docs/safetensors)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError
from bitwright.files import atomic_write

Array = NDArray[Any]
HEADER_BYTES = 100_000_000
"""A longer header isn't read, as the format's own library does it."""

DTYPES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
"""Types by name; of bfloat16, its bits."""


@dataclass(frozen=True)
class Stored:
    """A tensor that is to be written: made when it is its turn."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Array]


def of_array(name: str, dtype: str, values: Array) -> Stored:
    """A tensor that is there already."""
    return Stored(name, dtype, values.shape, lambda: values)


def write_tensors(path: Path, tensors: Sequence[Stored], metadata: Mapping[str, str]) -> Path:
    """Write a file; one tensor is in memory at a time.

    Raises:
        WriteError: it can't be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for t in tensors:
        begin, end = end, end + prod(t.shape) * np.dtype(DTYPES[t.dtype]).itemsize
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for t in tensors:
            values = np.ascontiguousarray(t.make(), np.dtype(DTYPES[t.dtype]))
            assert values.shape == t.shape, (t.name, values.shape, t.shape)
            file.write(values.tobytes())
    return path


@dataclass(frozen=True)
class TensorFile:
    """An open file: its tensors by name, read when they are asked for.

    Attributes:
        path: the file.
        entries: type, shape, and where the bytes are, from the file's beginning.
    """

    path: Path
    entries: Mapping[str, tuple[str, tuple[int, ...], int]]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header, and check that all of it lies within the file.

        Raises:
            InputError: it isn't such a file.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, HEADER_BYTES):
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length).decode())
            found: dict[str, tuple[str, tuple[int, ...], int]] = {}
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
                begin, end = (int(n) for n in entry["data_offsets"])
                if dtype in DTYPES and end - begin != prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
                    raise ValueError(f"{name!r} has {end - begin} bytes for {dtype} {shape}")
                if min((*shape, begin), default=0) < 0 or 8 + length + end > size:
                    raise ValueError(f"{name!r} lies outside of the file")
                found[name] = dtype, shape, 8 + length + begin
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} can't be read as safetensors: {error}") from error
        return cls(path, found)

    def read(self, name: str) -> Array:
        """A tensor as it is stored; of bfloat16, its bits.

        Raises:
            InputError: there is none of that name, or of a type that isn't read.
        """
        if name not in self.entries:
            raise InputError(f"{self.path} has no tensor {name!r}")
        dtype, shape, begin = self.entries[name]
        if dtype not in DTYPES:
            raise InputError(f"{self.path}: {name!r} is of type {dtype}, which isn't read")
        kind = np.dtype(DTYPES[dtype])
        with self.path.open("rb") as file:
            file.seek(begin)
            data = file.read(prod(shape) * kind.itemsize)
        return np.frombuffer(data, kind).reshape(shape)

    def floats(self, name: str) -> NDArray[np.float32]:
        """A tensor of any float type as float32."""
        values = self.read(name)
        if self.entries[name][0] == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32).reshape(values.shape)
        return values.astype(np.float32)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, whose lower halves are zero."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(values.shape)


def exact_in(values: NDArray[np.float32], dtype: str) -> bool:
    """Whether float32 numbers are such of a narrower type too."""
    if dtype == "BF16":
        return not (np.ascontiguousarray(values, np.float32).view(np.uint32) & 0xFFFF).any()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))
    return True


def as_stored(values: NDArray[np.float32], dtype: str) -> Array:
    """float32 numbers as a file has them, which must be exact."""
    return bfloat16_bits(values) if dtype == "BF16" else values.astype(np.dtype(DTYPES[dtype]))
