"""The files that a model's weights lie in: which of them a model may name, and its tensors as parts of them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from bitwright.errors import BitwrightError, ModelError, first_line
from bitwright.files import HeldFile
from bitwright_onnx.capture.reading import INSIDE, read_proto
from bitwright_onnx.graph.stored import ReadTensor, StoredTensor, stored_tensor
from bitwright_onnx.graph.tensors import DATA_FILES, tensor_array


def own_tensors(model: ir.Model, files: DataFiles) -> None:
    """Check every initializer's data, and cut the tie to the user's protobuf (bytes are shared, not copied).

    Args:
        model: changed in place.
        files: those that its tensors lie in.

    Raises:
        ModelError: a tensor has no data, others than it says, or they lie where they can't be or mustn't be read.
    """
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                raise ModelError(f"initializer {name!r} has no data")
            own = _own_tensor(tensor, name, files)
            value.const_value = own
            value.shape, value.dtype = ir.Shape(own.shape.numpy()), own.dtype
        for node in graph:
            for key, attr in list(node.attributes.items()):
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    try:
                        own = _own_tensor(attr.as_tensor(), None, files)
                    except BitwrightError:
                        raise
                    except (TypeError, ValueError) as error:  # a type that there isn't
                        raise ModelError(f"attribute {key!r} of node {node.name!r}: {first_line(error)}") from error
                    node.attributes[key] = ir.AttrTensor(key, own)
    if files.opened:
        model.graph.meta[DATA_FILES] = tuple(files.opened)


def _own_tensor(tensor: ir.TensorProtocol, name: str | None, files: DataFiles) -> ir.TensorProtocol:
    name = name or tensor.name
    if isinstance(tensor, StoredTensor | ReadTensor):
        return tensor
    if isinstance(tensor, ir.ExternalTensor):
        tensor.name = name or ""
        return stored_tensor(tensor, files.of(tensor))
    array = tensor_array(tensor)
    if array.shape != tuple(tensor.shape):
        raise ModelError(f"tensor {name!r} is declared {list(tensor.shape)} but holds {list(array.shape)}")
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(array, shape=ir.Shape(array.shape), name=name)
    return ir.Tensor(array, dtype=tensor.dtype, name=name)


class DataFiles:
    """The files that a model's tensors lie in, each opened once.

    Args:
        blobs: where the model's own file lies, if its path is a link.
        inside: the model's own file, where weights were left in it (see `reading`).
    """

    def __init__(self, blobs: Path | None = None, inside: HeldFile | None = None) -> None:
        self._blobs = blobs
        self._inside = inside
        self.opened: dict[Path, HeldFile] = {}

    def of(self, tensor: ir.ExternalTensor) -> HeldFile:
        """The file of a tensor.

        Raises:
            ModelError: as `_data_file`, or it can't be opened.
        """
        if self._inside is not None and tensor.location == INSIDE:
            return self._inside
        path = _data_file(tensor, self._blobs)
        if path not in self.opened:
            try:
                self.opened[path] = HeldFile(path)
            except OSError as error:
                raise ModelError(f"{str(path)!r} can't be read: {error.strerror or error}") from error
        return self.opened[path]


def _data_file(tensor: ir.ExternalTensor, blobs: Path | None) -> Path:
    """The file that holds a tensor: in the model's folder, or linked from beside the model to beside its own target.

    Raises:
        ModelError: it lies elsewhere or is missing.
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


def read_model(path: Path) -> ir.Model:
    """A model file as it is, not brought into normal form; its weights are read when they are needed.

    Raises:
        ModelError: its data lie where they can't be or mustn't be read.
    """
    proto, inside = read_proto(path)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    own_tensors(model, DataFiles(path.resolve().parent if path.is_symlink() else None, inside))
    return model
