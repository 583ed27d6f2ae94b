"""Constant tensors of a model as numpy arrays, and how much room they take."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright.files import Array

INLINE_BYTES = 1024
"""Bigger initializers are handed to ONNX Runtime by reference; smaller ones (shapes, axes) stay in the proto."""


LIBRARIES = "bitwright.custom_op_libraries"
"""Key of `graph.meta` under which a model remembers the custom-op libraries that the user gave."""
DATA_FILES = "bitwright.data_files"
"""The same for the files that its weights were opened from."""


def byte_size(tensor: ir.TensorProtocol) -> int:
    """Bytes of a tensor's data; 0 for strings, which have no width and always stay inside of the file."""
    return 0 if tensor.dtype is ir.DataType.STRING else tensor.nbytes


def tensor_array(tensor: ir.TensorProtocol) -> Array:
    """Values of a tensor, read where they lie in a file beside the model.

    Raises:
        ModelError: the file has changed since the model was opened.
    """
    try:
        return np.asarray(tensor.numpy())
    except Exception as error:
        raise ModelError(f"the data of tensor {tensor.name!r} can't be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an ONNX Runtime or onnx-ir error, without its codes."""
    text = str(error).strip() or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    return text.splitlines()[0].strip()[:400]
