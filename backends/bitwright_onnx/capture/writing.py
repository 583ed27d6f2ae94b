"""Writing ONNX models, one weight in memory at a time.

A protobuf message is made and serialized as a whole, which takes a model's size twice. Here the message is made without
the large weights, and their bytes are put in where it is written; the file is the same, byte by byte.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from bitwright.errors import InputError
from bitwright.files import field_prefix, split_message, written_beside
from bitwright_onnx.graph.opset import minimal_ir_version, opset_of
from bitwright_onnx.graph.tensors import byte_size

EXTERNAL_ABOVE = 1_800_000_000
"""Weights beyond this many bytes go to a file of their own: a protobuf message holds less than 2 GiB."""
STREAMED = 2**16
"""Bytes of a weight that is kept out of the message."""

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Numbers of the fields in ModelProto, GraphProto and TensorProto that lead to a weight's bytes."""


def save_model(model: ir.Model, path: str | os.PathLike[str], *, external_data: bool | None = None) -> Path:
    """Write a model atomically: files are written beside, synced and renamed.

    Args:
        path: the file; its folder must exist.
        external_data: whether weights go to `<path>.data`; None: only where the file would pass 2 GB.

    Raises:
        InputError: the file can't be written, or `<path>.data` belongs to something else.
    """
    path = Path(path)
    data = path.with_name(path.name + ".data")
    tensors = [v.const_value for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]
    external = external_data if external_data is not None else sum(map(byte_size, tensors)) > EXTERNAL_ABOVE
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"can't write {str(path)!r}: " + ("it is a folder" if path.is_dir() else "no such folder"))
    if external and data.exists() and not path.exists():
        raise InputError(
            f"can't write {str(path)!r} with external data: {str(data)!r} exists and belongs to no model of that name; "
            "remove it or choose another name"
        )
    copy = model.clone()
    copy.ir_version = max(model.ir_version, minimal_ir_version(opset_of(model) or 1))
    with written_beside(path) as folder:
        if external:
            ir.save(copy, folder / path.name, external_data=data.name)
        else:
            with (folder / path.name).open("wb") as stream:
                write_inline(copy, stream)
    return path


def write_inline(model: ir.Model, file: BinaryIO) -> None:
    """Write a model that the caller owns as one message with its weights."""
    weights: list[ir.TensorProtocol | None] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        streamed = tensor is not None and byte_size(tensor) >= STREAMED
        weights.append(tensor if streamed else None)
        if tensor is not None and streamed:
            value.const_value = ir.ExternalTensor(
                "follows", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or "",
                doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props),
            )  # fmt: skip
    proto = ir.to_proto(model)
    heads: list[tuple[bytes, ir.TensorProtocol | None, bytes]] = []
    for initializer, weight in zip(proto.graph.initializer, weights, strict=True):
        if weight is not None:
            for field in ("external_data", "data_location"):
                initializer.ClearField(field)
        before, after = split_message(initializer, RAW_DATA)
        heads.append((before, weight, after))
    del proto.graph.initializer[:]
    graph_before, graph_after = split_message(proto.graph, INITIALIZER)
    proto.ClearField("graph")
    model_before, model_after = split_message(proto, GRAPH)
    lengths = [_length(before, weight, after) for before, weight, after in heads]
    inside = sum(len(field_prefix(INITIALIZER, n)) + n for n in lengths)
    file.write(model_before + field_prefix(GRAPH, len(graph_before) + inside + len(graph_after)) + graph_before)
    for (before, weight, after), length in zip(heads, lengths, strict=True):
        file.write(field_prefix(INITIALIZER, length) + before)
        if weight is not None:
            file.write(field_prefix(RAW_DATA, weight.nbytes))
            file.write(weight.tobytes())
        file.write(after)
    file.write(graph_after + model_after)


def _length(before: bytes, weight: ir.TensorProtocol | None, after: bytes) -> int:
    data = 0 if weight is None else len(field_prefix(RAW_DATA, weight.nbytes)) + weight.nbytes
    return len(before) + data + len(after)
