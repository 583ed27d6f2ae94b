"""Opening ONNX models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from bitwright.errors import InputError, ModelError, first_line
from bitwright_onnx.capture.data_files import DataFiles, own_tensors
from bitwright_onnx.capture.normalize import normalize
from bitwright_onnx.capture.reading import read_proto
from bitwright_onnx.capture.wellformed import undecoded
from bitwright_onnx.graph.tensors import LIBRARIES


def load_model(path: str | os.PathLike[str], *, custom_ops: Sequence[str | os.PathLike[str]] = ()) -> ir.Model:
    """Open a model file; external data are read when they are needed (see `StoredTensor`).

    Args:
        path: a .onnx file (or .onnxtxt, .json, …: ONNX's text formats by suffix).
        custom_ops: shared libraries that hold the model's custom ops, for ONNX Runtime.

    Raises:
        InputError: there is no such file, or it isn't an ONNX model.
        ModelError: external data are missing, or the model can't be normalized (see `normalize`).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"there is no model file {str(path)!r}" if not path.exists() else f"{str(path)!r} is not a file"
        )
    if path.stat().st_size == 0:
        raise InputError(f"{str(path)!r} is empty, so it is not an ONNX model")
    try:
        proto, inside = read_proto(path)
    except Exception as error:
        if isinstance(error, OSError):
            raise InputError(f"{str(path)!r} can't be read: {error.strerror or error}") from error
        raise InputError(f"{str(path)!r} is not an ONNX model, or it is damaged: {first_line(error)}") from error
    # What a cache of links has beside the model lies, as the model itself does, where the links lead.
    blobs = path.resolve().parent if path.is_symlink() else None
    return _from_proto(proto, repr(str(path)), path.parent, custom_ops, DataFiles(blobs, inside))


def adopt_model(model: object, *, custom_ops: Sequence[str | os.PathLike[str]] = ()) -> ir.Model:
    """The backend's own copy of what the user holds: a path, a `ModelProto`, its bytes, or an `onnx_ir.Model`.

    The object is never changed; weights are shared with it where they can't change under us.

    Raises:
        InputError: it is something else, or not an ONNX model.
        ModelError: as `load_model`.
    """
    if isinstance(model, ir.Model):
        copy = model.clone()
        copy.graph.meta.update(model.graph.meta)
        return _finished(copy, "the model", custom_ops)
    if isinstance(model, onnx.ModelProto):
        return _from_proto(model, "the ModelProto", Path(), custom_ops)
    if isinstance(model, bytes | bytearray | memoryview):
        proto = onnx.ModelProto()
        try:
            proto.ParseFromString(bytes(model))
        except Exception as error:
            raise InputError(f"the bytes are not an ONNX model: {first_line(error)}") from error
        return _from_proto(proto, "the model in memory", Path(), custom_ops)
    if isinstance(model, str | os.PathLike):
        return load_model(model, custom_ops=custom_ops)
    raise InputError(f"a {type(model).__name__} is not an ONNX model; give a path, a ModelProto or an onnx_ir.Model")


def _from_proto(
    proto: onnx.ModelProto, name: str, folder: Path, custom_ops: Sequence[Any], files: DataFiles | None = None
) -> ir.Model:
    graph = proto.graph
    if proto.ir_version <= 0 or not (graph.node or graph.initializer or graph.input) or not graph.output:
        raise InputError(f"{name} is not an ONNX model: it holds no graph")
    if field := undecoded(proto):
        raise ModelError(f"{name} is damaged: its {field} is not UTF-8 text")
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(f"{name} is damaged or uses what onnx-ir can't read: {first_line(_root(error))}") from error
    ir.external_data.set_base_dir(model.graph, folder)
    return _finished(model, name, custom_ops, files)


def _finished(model: ir.Model, name: str, custom_ops: Sequence[Any], files: DataFiles | None = None) -> ir.Model:
    libraries = [Path(p).resolve() for p in custom_ops]
    for library in libraries:
        if not library.is_file():
            raise InputError(f"there is no custom-op library {str(library)!r}")
    if libraries:
        model.graph.meta[LIBRARIES] = tuple(map(str, libraries))
    try:
        own_tensors(model, files or DataFiles())
        return normalize(model)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    except (ir.passes.InvariantError, ir.passes.PassError) as error:
        raise ModelError(f"{name} is damaged, or is beyond onnx-ir: {first_line(_root(error))}") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _root(error: BaseException) -> BaseException:
    return list(_causes(error))[-1]
