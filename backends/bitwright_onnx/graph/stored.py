"""Constant tensors that lie in files beside the model or in another framework, read when they are asked for."""

from __future__ import annotations

import weakref

import numpy as np
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright.files import Array, HeldFile

READ_BYTES = 2**16
"""Smaller tensors are read once, when the model is opened."""


class StoredTensor(ir.LazyTensor):
    """A tensor of a data file; its values are in memory for as long as somebody holds them.

    Args:
        file: the data file.
        offset: where the tensor's bytes begin.
        dtype: its type.
        shape: its shape, all dimensions known.
        name: its name.
    """

    def __init__(self, file: HeldFile, offset: int, dtype: ir.DataType, shape: ir.Shape, name: str) -> None:
        super().__init__(self._read, dtype, shape, name=name)
        self.file = file
        self._offset = offset
        self._held: weakref.ref[Array] | None = None

    def _read(self) -> ir.TensorProtocol:
        raw = np.empty(self.nbytes, np.uint8)
        self.file.fill(self._offset, raw.data)
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(raw, self.dtype, shape=self.shape, name=self.name)
        values = raw.view(self.dtype.numpy().newbyteorder("<")).reshape(tuple(self.shape.numpy()))
        return ir.Tensor(values, dtype=self.dtype, name=self.name)

    def numpy(self) -> Array:
        """The values, not to be written to: one array for all who hold it at a time.

        Raises:
            InputError: the file can't be read, or has changed since the model was opened.
        """
        held = None if self._held is None else self._held()
        if held is None:
            held = np.asarray(self._read().numpy())
            held.flags.writeable = False
            self._held = weakref.ref(held)
        return held


class ReadTensor(ir.LazyTensor):
    """A parameter of another framework's model, read from there each time that its values are asked for."""


def stored_tensor(tensor: ir.ExternalTensor, file: HeldFile) -> ir.TensorProtocol:
    """An external tensor as one of an open file; a small one, read.

    Raises:
        ModelError: the file is too short for it.
        InputError: the file can't be read.
    """
    name, offset = tensor.name or "", tensor.offset or 0
    if tensor.dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING) or any(d < 0 for d in tensor.shape.numpy()):
        raise ModelError(f"tensor {name!r} is {tensor.dtype.name} of shape {tensor.shape}, which no file can hold")
    whole = StoredTensor(file, offset, tensor.dtype, ir.Shape(tensor.shape), name)
    if offset < 0 or (tensor.length is not None and tensor.length < whole.nbytes):
        raise ModelError(
            f"the data of tensor {name!r} can't be read in {file.path}: its shape and type take {whole.nbytes} bytes, "
            f"and they are said to be {tensor.length} from byte {offset} on"
        )
    if offset + whole.nbytes > file.size:
        raise ModelError(f"the external data file {str(file.path)!r} is cut short: tensor {name!r} lies beyond its end")
    return whole if whole.nbytes >= READ_BYTES else ir.Tensor(whole.numpy(), dtype=tensor.dtype, name=name)
