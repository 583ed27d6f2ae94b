"""Protobuf messages with large fields, written piece by piece.

To serialize a message takes its size twice. Here it is made without its large fields, and their bytes are put in where
it is written; the file is the same, byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
from numpy.typing import NDArray

NODE, ATTRIBUTES, VALUE, TENSOR, CONTENT = 1, 5, 2, 8, 4
"""Numbers of the fields in TensorFlow's GraphDef, NodeDef, entry of a map, AttrValue and TensorProto that lead to a
constant's bytes."""


class Message(Protocol):
    """What is asked of a protobuf message, whose classes the core doesn't know."""

    def CopyFrom(self, other: Self, /) -> None:
        """Take the other's fields."""

    def ListFields(self) -> Sequence[tuple[Any, Any]]:
        """Fields that are set, by their numbers: descriptor and value."""

    def ClearField(self, name: str, /) -> None:
        """Unset one."""

    def SerializeToString(self, *, deterministic: bool = ...) -> bytes:
        """The message as it stands in a file."""


class NodeDef(Message, Protocol):
    """TensorFlow's node of a graph."""

    name: str
    op: str

    @property
    def attr(self) -> Mapping[str, Any]:
        """Attributes by name: a map of messages."""


class GraphDef(Message, Protocol):
    """TensorFlow's graph."""

    @property
    def node(self) -> Sequence[NodeDef]:
        """The nodes."""


def field_prefix(number: int, length: int) -> bytes:
    """What stands before the bytes of a field of that number: its key and how many they are."""
    return bytes([*_varint(number << 3 | 2), *_varint(length)])


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def split_message(message: Message, number: int) -> tuple[bytes, bytes]:
    """A message in two pieces: its fields below a number, and the others."""
    pieces = []
    for below in (True, False):
        piece = type(message)()
        piece.CopyFrom(message)
        for field, _ in message.ListFields():
            if (field.number < number) is not below:
                piece.ClearField(field.name)
        pieces.append(piece.SerializeToString(deterministic=True))
    return pieces[0], pieces[1]


def write_graph_def(graph_def: GraphDef, values: Mapping[str, Callable[[], NDArray[Any]]], file: BinaryIO) -> None:
    """Write a TensorFlow graph as `SerializeToString(deterministic=True)` gives it, large constants one by one.

    Args:
        graph_def: a `GraphDef`; of the constants in `values` type and shape are enough.
        values: node of a constant → what gives its values, in the type and shape that the node says.
        file: where to.

    Raises:
        ValueError: a node in `values` is no constant, or its values have another shape than it says.
    """
    rest = type(graph_def)()
    for field, held in graph_def.ListFields():
        if field.message_type is None:
            setattr(rest, field.name, held)
        elif field.number != NODE:
            getattr(rest, field.name).CopyFrom(held)
    for node in graph_def.node:
        if node.name in values:
            _write_constant(node, values[node.name], file)
        else:
            data = node.SerializeToString(deterministic=True)
            file.write(field_prefix(NODE, len(data)))
            file.write(data)
    file.write(rest.SerializeToString(deterministic=True))


def _write_constant(node: NodeDef, value: Callable[[], NDArray[Any]], file: BinaryIO) -> None:
    if node.op != "Const":
        raise ValueError(f"{node.name!r} is a {node.op}, not a constant")
    tensor = type(node.attr["value"].tensor)(
        dtype=node.attr["value"].tensor.dtype, tensor_shape=node.attr["value"].tensor.tensor_shape
    )
    bare = type(node)()
    bare.CopyFrom(node)
    bare.ClearField("attr")
    before, after = split_message(bare, ATTRIBUTES)
    attributes = []
    for below in (True, False):
        some = type(node)()
        for key in node.attr:
            if key != "value" and (key < "value") is below:
                some.attr[key].CopyFrom(node.attr[key])
        attributes.append(some.SerializeToString(deterministic=True))
    array, shape = np.asarray(value(), order="C"), tuple(d.size for d in tensor.tensor_shape.dim)
    if array.shape != shape:
        raise ValueError(f"{node.name!r} has values of shape {array.shape} for a constant of shape {shape}")
    data = array.reshape(-1).view(np.uint8)
    held = tensor.SerializeToString(deterministic=True) + field_prefix(CONTENT, data.size)
    inside = len(held) + data.size
    attribute = field_prefix(TENSOR, inside)
    entry = field_prefix(1, len(b"value")) + b"value" + field_prefix(VALUE, len(attribute) + inside)
    whole = len(entry) + len(attribute) + inside
    head = before + attributes[0] + field_prefix(ATTRIBUTES, whole) + entry + attribute + held
    file.write(field_prefix(NODE, len(head) + data.size + len(attributes[1]) + len(after)) + head)
    file.write(data.data)
    file.write(attributes[1] + after)
