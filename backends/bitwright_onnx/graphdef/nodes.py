"""Reading TensorFlow's GraphDef messages by their fields, whatever module they come from; imports no TensorFlow.

Field and enum numbers: tensorflow/core/framework/{graph,node_def,attr_value,tensor,types}.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.errors import ModelError

FLOAT, INT32, INT64, BOOL, STRING = 1, 3, 9, 10, 7
NUMPY_TYPES: Mapping[int, Any] = {
    1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 5: np.int16, 6: np.int8, 9: np.int64, 10: np.bool_,
    14: ml_dtypes.bfloat16, 17: np.uint16, 19: np.float16, 22: np.uint32, 23: np.uint64,
}  # fmt: skip
"""TensorFlow's DataType → numpy."""

_FIELDS: Mapping[int, str] = {
    1: "float_val", 2: "double_val", 3: "int_val", 4: "int_val", 5: "int_val", 6: "int_val", 9: "int64_val",
    10: "bool_val", 14: "half_val", 17: "int_val", 19: "half_val", 22: "uint32_val", 23: "uint64_val",
}  # fmt: skip


def tensor_name(reference: str) -> str:
    """A tensor's full name: "conv" is output 0 of node conv, so "conv:0"."""
    return reference if ":" in reference else f"{reference}:0"


def onnx_type(dtype: int, *, model_input: bool = False) -> ir.DataType:
    """The ONNX type that a TensorFlow DataType is computed in; 32-bit integers become 64-bit ones but for inputs.

    ONNX wants 64 bits for shapes, indices and axes, where TensorFlow has 32.

    Raises:
        ModelError: ONNX has no such type.
    """
    if dtype not in NUMPY_TYPES:
        raise ModelError(f"TensorFlow type {dtype} (strings, complex numbers, resources) has no ONNX counterpart")
    if dtype == INT32 and not model_input:
        return ir.DataType.INT64
    return ir.DataType.from_numpy(np.dtype(NUMPY_TYPES[dtype]))


def decode(tensor: Any) -> NDArray[Any]:
    """A TensorProto's values.

    Raises:
        ModelError: the type can't be decoded, or the data don't fit the shape.
    """
    dtype, shape = int(tensor.dtype), tuple(int(d.size) for d in tensor.tensor_shape.dim)
    if dtype not in NUMPY_TYPES:
        raise ModelError(f"a constant of TensorFlow type {dtype} can't be read")
    kind, size = np.dtype(NUMPY_TYPES[dtype]), int(np.prod(shape, dtype=np.int64))
    if tensor.tensor_content:
        flat = np.frombuffer(tensor.tensor_content, kind)
    else:
        values = getattr(tensor, _FIELDS[dtype])
        bits = dtype in (14, 19)  # halves travel as their bits
        flat = np.asarray(list(values), np.uint16).view(kind) if bits else np.asarray(list(values), kind)
        if 0 < flat.size < size:  # the last value stands for all that follow
            flat = np.concatenate([flat, np.full(size - flat.size, flat[-1], kind)])
        elif flat.size == 0:
            flat = np.zeros(size, kind)
    if flat.size != size:
        raise ModelError(f"a constant of shape {list(shape)} holds {flat.size} values")
    return flat.reshape(shape)


class Node:
    """One NodeDef.

    Attributes:
        name, op: as in the file.
        inputs: full names of the data inputs ("x:0"); control inputs are left out.
    """

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.name, self.op = str(proto.name), str(proto.op)
        self.inputs = tuple(tensor_name(i) for i in proto.input if not i.startswith("^"))

    def output(self, index: int = 0) -> str:
        """Full name of an output."""
        return f"{self.name}:{index}"

    def has(self, key: str) -> bool:
        """Whether an attribute is set."""
        return key in self.proto.attr

    def integer(self, key: str, default: int = 0) -> int:
        """An int attribute."""
        return int(self.proto.attr[key].i) if self.has(key) else default

    def number(self, key: str, default: float = 0.0) -> float:
        """A float attribute."""
        return float(self.proto.attr[key].f) if self.has(key) else default

    def flag(self, key: str, default: bool = False) -> bool:
        """A bool attribute."""
        return bool(self.proto.attr[key].b) if self.has(key) else default

    def text(self, key: str, default: str = "") -> str:
        """A bytes attribute as text."""
        return self.proto.attr[key].s.decode() if self.has(key) else default

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of ints; () where it isn't set."""
        return tuple(int(i) for i in self.proto.attr[key].list.i) if self.has(key) else ()

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of floats; () where it isn't set."""
        return tuple(float(f) for f in self.proto.attr[key].list.f) if self.has(key) else ()

    def dtype(self, key: str) -> int:
        """A type attribute's DataType number."""
        return int(self.proto.attr[key].type)

    def value(self) -> NDArray[Any]:
        """A Const's values."""
        try:
            return decode(self.proto.attr["value"].tensor)
        except ModelError as error:
            raise ModelError(f"constant {self.name!r}: {error}") from None

    def shape(self, index: int = 0) -> tuple[int | None, ...] | None:
        """Static shape of an output, where the file records it (`Graph.as_graph_def(add_shapes=True)`)."""
        key = "shape" if self.op == "Placeholder" and not self.has("_output_shapes") else "_output_shapes"
        if not self.has(key):
            return None
        attr = self.proto.attr[key]
        shapes = [attr.shape] if key == "shape" else list(attr.list.shape)
        if index >= len(shapes) or shapes[index].unknown_rank:
            return None
        return tuple(int(d.size) if d.size >= 0 else None for d in shapes[index].dim)
