"""Opening and writing ONNX models."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from bitwright.errors import InputError, ModelError
from bitwright.files import cannot_write
from bitwright_onnx.capture.normalize import normalize
from bitwright_onnx.capture.wellformed import undecoded
from bitwright_onnx.graph.opset import minimal_ir_version, opset_of
from bitwright_onnx.graph.tensors import LIBRARIES, byte_size, tensor_array

EXTERNAL_ABOVE = 1_800_000_000
"""Weights beyond this many bytes go to a file of their own: a protobuf message holds less than 2 GiB."""


def load_model(path: str | os.PathLike[str], *, custom_ops: Sequence[str | os.PathLike[str]] = ()) -> ir.Model:
    """Open a model file; external data are memory-mapped, not read.

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
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:
        if isinstance(error, OSError):
            raise InputError(f"{str(path)!r} can't be read: {error.strerror or error}") from error
        raise InputError(f"{str(path)!r} is not an ONNX model, or it is damaged: {_first_line(error)}") from error
    # What a cache of links has beside the model lies, as the model itself does, where the links lead.
    blobs = path.resolve().parent if path.is_symlink() else None
    return _from_proto(proto, repr(str(path)), path.parent, custom_ops, blobs)


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
            raise InputError(f"the bytes are not an ONNX model: {_first_line(error)}") from error
        return _from_proto(proto, "the model in memory", Path(), custom_ops)
    if isinstance(model, str | os.PathLike):
        return load_model(model, custom_ops=custom_ops)
    raise InputError(f"a {type(model).__name__} is not an ONNX model; give a path, a ModelProto or an onnx_ir.Model")


def _from_proto(
    proto: onnx.ModelProto, name: str, folder: Path, custom_ops: Sequence[Any], blobs: Path | None = None
) -> ir.Model:
    graph = proto.graph
    if proto.ir_version <= 0 or not (graph.node or graph.initializer or graph.input) or not graph.output:
        raise InputError(f"{name} is not an ONNX model: it holds no graph")
    if field := undecoded(proto):
        raise ModelError(f"{name} is damaged: its {field} is not UTF-8 text")
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(f"{name} is damaged or uses what onnx-ir can't read: {_first_line(_root(error))}") from error
    ir.external_data.set_base_dir(model.graph, folder)
    return _finished(model, name, custom_ops, blobs)


def _finished(model: ir.Model, name: str, custom_ops: Sequence[Any], blobs: Path | None = None) -> ir.Model:
    libraries = [Path(p).resolve() for p in custom_ops]
    for library in libraries:
        if not library.is_file():
            raise InputError(f"there is no custom-op library {str(library)!r}")
    if libraries:
        model.graph.meta[LIBRARIES] = tuple(map(str, libraries))
    try:
        _own_tensors(model, blobs)
        return normalize(model)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    except (ir.passes.InvariantError, ir.passes.PassError) as error:
        raise ModelError(f"{name} is damaged, or is beyond onnx-ir: {_first_line(_root(error))}") from error


def _own_tensors(model: ir.Model, blobs: Path | None) -> None:
    """Check every initializer's data, and cut the tie to the user's protobuf (bytes are shared, not copied)."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                raise ModelError(f"initializer {name!r} has no data")
            own = _own_tensor(tensor, name, blobs)
            value.const_value = own
            value.shape, value.dtype = ir.Shape(tensor_array(own).shape), own.dtype
        for node in graph:
            for key, attr in list(node.attributes.items()):
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    node.attributes[key] = ir.AttrTensor(key, _own_tensor(attr.as_tensor(), None, blobs))


def _own_tensor(tensor: ir.TensorProtocol, name: str | None, blobs: Path | None) -> ir.TensorProtocol:
    name = name or tensor.name
    if isinstance(tensor, ir.ExternalTensor):
        file = _data_file(tensor, blobs)
        own = ir.ExternalTensor(
            file.name, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name or "",
            base_dir=file.parent,
        )  # fmt: skip
        tensor_array(own)
        return own
    array = tensor_array(tensor)
    if array.shape != tuple(tensor.shape):
        raise ModelError(f"tensor {name!r} is declared {list(tensor.shape)} but holds {list(array.shape)}")
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(array, shape=ir.Shape(array.shape), name=name)
    return ir.Tensor(array, dtype=tensor.dtype, name=name)


def _data_file(tensor: ir.ExternalTensor, blobs: Path | None) -> Path:
    """The file that holds a tensor: in the model's folder, or linked from beside the model to beside its own target.

    Raises:
        ModelError: it lies elsewhere, is missing or cut short.
    """
    base = Path(tensor.base_dir or ".").resolve()
    if "\0" in str(tensor.location):
        raise ModelError(f"tensor {tensor.name!r} lies in a file whose name holds a NUL, {str(tensor.location)!r}")
    path = (base / tensor.location).resolve()
    if not path.is_relative_to(base) and not _is_blob(base, Path(tensor.location), blobs):
        raise ModelError(f"tensor {tensor.name!r} points outside the model's folder, to {str(tensor.location)!r}")
    if not path.is_file():
        raise ModelError(
            f"the external data of tensor {tensor.name!r} are missing: no file {str(path)!r}. "
            "Keep the data file beside the model and open the model by its path"
        )
    if path.stat().st_size < (tensor.offset or 0) + (tensor.length or 0):
        raise ModelError(
            f"the external data file {str(path)!r} is cut short: tensor {tensor.name!r} lies beyond its end"
        )
    return path


def _is_blob(base: Path, location: Path, blobs: Path | None) -> bool:
    """Whether data lie as in a download cache: model and data are links beside each other to files in one folder.

    A name that the model's text gives can so lead to no folder but the one where the model's own file lies; links to
    links and names with folders aren't followed.
    """
    link = base / location
    if blobs is None or location.name != str(location) or not link.is_symlink():
        return False
    target = base / link.readlink()
    return not target.is_symlink() and target.parent.resolve() == blobs


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
    _map_external(model)
    _map_external(copy)
    copy.ir_version = max(model.ir_version, minimal_ir_version(opset_of(model) or 1))
    try:
        with tempfile.TemporaryDirectory(prefix=f".bitwright-{os.getpid()}-", dir=path.parent) as folder:
            written = Path(folder) / path.name
            if external:
                ir.save(copy, written, external_data=data.name)
            else:
                written.write_bytes(ir.to_proto(copy).SerializeToString())
            files = [p for p in (Path(folder) / data.name, written) if p.exists()]
            for file in files:
                _sync(file)
            # The data first: a model file never points at weights that aren't there yet.
            for file in files:
                file.replace(path.parent / file.name)
            _sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def _map_external(model: ir.Model) -> None:
    """Hold external tensors as memory maps: these stay readable when the file is replaced under its name."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                array = np.asarray(tensor_array(value.const_value))
                value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _root(error: BaseException) -> BaseException:
    return list(_causes(error))[-1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
