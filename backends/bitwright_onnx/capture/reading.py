"""Reading ONNX files without the weights in them.

Protobuf parses a file as a whole, which takes its size twice. Of a large file the weights are left where they are: each
of them becomes external data of the file itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import onnx

from bitwright.files import HeldFile, field_prefix
from bitwright_onnx.capture.writing import GRAPH, INITIALIZER, RAW_DATA, STREAMED

LAZY_ABOVE = 2**27
"""Size of a file from which on weights are left in it."""
INSIDE = "\0"
"""In the place of a data file's name, which has no such character: the model's own file."""

_VARINT, _BYTES = 0, 2
_WIDTHS = {1: 8, 5: 4}
"""Kinds of fields in protobuf's encoding, and the bytes of those that have a fixed number."""


class _Field(NamedTuple):
    number: int
    kind: int
    start: int
    """Of its key."""
    content: int
    end: int


def read_proto(path: Path) -> tuple[onnx.ModelProto, HeldFile | None]:
    """A model file without its external data.

    Returns:
        The model; and its own file, where weights were left in it, as external data at `INSIDE`.

    Raises:
        Exception: of many kinds, where it is no ONNX model or damaged.
    """
    if path.stat().st_size >= LAZY_ABOVE and path.suffix == ".onnx":
        file = HeldFile(path)
        try:
            proto = onnx.ModelProto.FromString(_skeleton(file))
        except ValueError:
            pass  # not as expected: protobuf itself says what is wrong with it, or makes something of it
        else:
            return proto, file
    return onnx.load(path, load_external_data=False), None


def _skeleton(file: HeldFile) -> bytes:
    """The message without the large weights of its graph.

    Raises:
        ValueError: it isn't encoded as a writer of models would.
    """
    made = bytearray()
    graphs = 0
    for field in _fields(file, 0, file.size):
        if field.number == GRAPH and field.kind == _BYTES:
            graphs += 1
            graph = _graph(file, field)
            made += field_prefix(GRAPH, len(graph)) + graph
        else:
            made += _bytes(file, field.start, field.end)
    if graphs != 1:
        raise ValueError(f"{graphs} graphs")
    return bytes(made)


def _graph(file: HeldFile, graph: _Field) -> bytes:
    made = bytearray()
    for field in _fields(file, graph.content, graph.end):
        if field.number == INITIALIZER and field.kind == _BYTES and field.end - field.content >= STREAMED:
            tensor = _tensor(file, field)
            made += field_prefix(INITIALIZER, len(tensor)) + tensor
        else:
            made += _bytes(file, field.start, field.end)
    return bytes(made)


def _tensor(file: HeldFile, tensor: _Field) -> bytes:
    """An initializer as external data of its own file, if its values are one run of bytes."""
    fields = list(_fields(file, tensor.content, tensor.end))
    raw = [f for f in fields if f.number == RAW_DATA and f.kind == _BYTES]
    if len(raw) != 1:
        return _bytes(file, tensor.content, tensor.end)
    proto = onnx.TensorProto.FromString(b"".join(_bytes(file, f.start, f.end) for f in fields if f is not raw[0]))
    if proto.external_data or proto.data_location != onnx.TensorProto.DEFAULT:
        return _bytes(file, tensor.content, tensor.end)
    proto.data_location = onnx.TensorProto.EXTERNAL
    place = {"location": INSIDE, "offset": raw[0].content, "length": raw[0].end - raw[0].content}
    for key, value in place.items():
        proto.external_data.add(key=key, value=str(value))
    return bytes(proto.SerializeToString())


def _fields(file: HeldFile, start: int, end: int) -> Iterator[_Field]:
    """The fields of the message that lies there."""
    while start < end:
        key, at = _varint(file, start, end)
        kind = key & 7
        if kind == _VARINT:
            stop = _varint(file, at, end)[1]
        elif kind == _BYTES:
            length, at = _varint(file, at, end)
            stop = at + length
        elif kind in _WIDTHS:
            stop = at + _WIDTHS[kind]
        else:
            raise ValueError(f"a field of kind {kind}")
        if stop > end:
            raise ValueError("a field that ends behind its message")
        yield _Field(key >> 3, kind, start, at, stop)
        start = stop


def _varint(file: HeldFile, start: int, end: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for index, byte in enumerate(_bytes(file, start, min(start + 10, end))):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, start + index + 1
    raise ValueError("a number without an end")


def _bytes(file: HeldFile, start: int, end: int) -> bytes:
    made = bytearray(end - start)
    file.fill(start, memoryview(made))
    return bytes(made)
