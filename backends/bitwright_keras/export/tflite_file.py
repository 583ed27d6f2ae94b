"""TFLite files as objects: which tensors they hold, on what grids, and what computes them.

The schema's classes come with TensorFlow (tensorflow/lite/schema/schema.fbs); a file is read and written whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError, needs_extra
from bitwright.files import atomic_write

IDENTIFIER = b"TFL3"
_DTYPES: Mapping[int, Any] = {
    0: np.float32, 1: np.float16, 2: np.int32, 3: np.uint8, 4: np.int64, 6: np.bool_, 7: np.int16, 9: np.int8,
    10: np.float64,
}  # fmt: skip
INT8, INT32, FLOAT32 = 9, 2, 0
_PLUMBING = frozenset({"QUANTIZE", "DEQUANTIZE", "RESHAPE", "SHAPE", "STRIDED_SLICE", "PACK", "CAST", "GATHER_ND",
                       "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "FILL", "RANGE"})  # fmt: skip


@dataclass(frozen=True)
class TensorGrid:
    """The grid of a tensor in a file: one scale and zero point, or one for each index of `axis`.

    Attributes:
        scale, zero_point: as stored, of shape (n,).
        axis: quantized dimension; 0 where there is one scale.
        dtype: numpy's name of the stored type.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]
    axis: int
    dtype: str

    def same(self, other: TensorGrid) -> bool:
        """Whether codes mean the same numbers on both."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)


class TfliteFile:
    """One model with one subgraph.

    Args:
        content: the file's bytes.
        source: its name, for messages.

    Raises:
        InputError: it is not a TFLite model, or has several subgraphs.
        MissingExtraError: TensorFlow isn't installed.
    """

    def __init__(self, content: bytes, source: str = "the file") -> None:
        self._schema = _schema()
        if len(content) < 8 or content[4:8] != IDENTIFIER:
            raise InputError(f"{source} is not a TFLite model")
        try:
            self.model = self._schema.ModelT.InitFromPackedBuf(content, 0)
        except Exception as error:
            raise InputError(f"{source} is damaged: {error}") from error
        if len(self.model.subgraphs or ()) != 1:
            raise InputError(f"{source} has {len(self.model.subgraphs or ())} subgraphs; control flow isn't supported")
        self.graph = self.model.subgraphs[0]

    @classmethod
    def read(cls, path: str | Path) -> TfliteFile:
        """Open a file.

        Raises:
            InputError: there is no such file, or it is not a TFLite model.
        """
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"{str(path)!r} can't be read: {error.strerror or error}") from error

    def pack(self) -> bytes:
        """The model as a file's bytes."""
        import flatbuffers  # type: ignore[import-untyped]

        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), file_identifier=IDENTIFIER)
        return bytes(builder.Output())

    def write(self, path: Path) -> Path:
        """Write atomically."""
        with atomic_write(path) as file:
            file.write(self.pack())
        return path

    @property
    def tensors(self) -> list[Any]:
        """TensorT objects, by index."""
        return list(self.graph.tensors)

    def name(self, index: int) -> str:
        """A tensor's name."""
        return str(self.graph.tensors[index].name.decode())

    def rename(self, index: int, name: str) -> None:
        """Give a tensor another name."""
        self.graph.tensors[index].name = name.encode()

    @cached_property
    def kinds(self) -> Mapping[int, str]:
        """Operator names by number: 3 → "CONV_2D"."""
        table = vars(self._schema.BuiltinOperator)
        return {number: name for name, number in table.items() if isinstance(number, int)}

    def kind(self, operator: Any) -> str:
        """An operator's name."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        number = max(int(code.builtinCode), int(code.deprecatedBuiltinCode))
        if self.kinds.get(number) == "CUSTOM":
            return str(code.customCode.decode())
        return self.kinds.get(number, str(number))

    def operators(self) -> Iterator[tuple[str, Any]]:
        """(name, OperatorT), in order of execution."""
        for operator in self.graph.operators:
            yield self.kind(operator), operator

    def shape(self, index: int) -> tuple[int, ...]:
        """A tensor's shape."""
        shape = self.graph.tensors[index].shape
        return () if shape is None else tuple(int(d) for d in shape)

    def constant(self, index: int) -> NDArray[Any] | None:
        """The values of a tensor that the file holds; None for computed ones."""
        tensor = self.graph.tensors[index]
        data = self.model.buffers[tensor.buffer].data
        if tensor.buffer == 0 or data is None or len(data) == 0 or tensor.type not in _DTYPES:
            return None
        flat = np.frombuffer(np.asarray(data, np.uint8).tobytes(), _DTYPES[tensor.type])
        return flat.reshape(self.shape(index))

    def set_constant(self, index: int, values: NDArray[Any]) -> None:
        """Replace a tensor's values; one that shares its buffer with others gets a buffer of its own."""
        tensor = self.graph.tensors[index]
        array = np.ascontiguousarray(values, _DTYPES[tensor.type])
        data = np.frombuffer(array.tobytes(), np.uint8)
        if sum(t.buffer == tensor.buffer for t in self.graph.tensors) > 1:
            self.model.buffers.append(self._schema.BufferT())
            tensor.buffer = len(self.model.buffers) - 1
        self.model.buffers[tensor.buffer].data = data

    def grid(self, index: int) -> TensorGrid | None:
        """A tensor's grid; None in float."""
        tensor = self.graph.tensors[index]
        q = tensor.quantization
        if q is None or q.scale is None or len(q.scale) == 0:
            return None
        zero = np.zeros(len(q.scale), np.int64) if q.zeroPoint is None else np.asarray(q.zeroPoint, np.int64)
        dtype = np.dtype(_DTYPES.get(tensor.type, np.uint8)).name
        return TensorGrid(np.asarray(q.scale, np.float32), zero, int(q.quantizedDimension), dtype)

    def set_grid(self, index: int, scale: NDArray[np.float32], zero_point: NDArray[Any]) -> None:
        """Replace a tensor's scales and zero points; its axis stays."""
        q = self.graph.tensors[index].quantization
        q.scale = np.asarray(scale, np.float32).reshape(-1)
        q.zeroPoint = np.asarray(zero_point, np.int64).reshape(-1)
        q.min = q.max = None

    def producers(self) -> dict[int, int]:
        """Tensor → position of the operator that computes it."""
        return {int(t): i for i, (_, operator) in enumerate(self.operators()) for t in operator.outputs}

    def floating(self) -> dict[str, int]:
        """Operators that compute in float, with their number; those that only move or convert data aren't counted."""
        found: dict[str, int] = {}
        for kind, operator in self.operators():
            types = [self.graph.tensors[i].type for i in (*operator.inputs, *operator.outputs) if i >= 0]
            if kind not in _PLUMBING and FLOAT32 in types:
                found[kind] = found.get(kind, 0) + 1
        return found

    def grids(self) -> dict[str, TensorGrid]:
        """Every quantized tensor by name."""
        found = {self.name(i): self.grid(i) for i in range(len(self.graph.tensors))}
        return {name: grid for name, grid in found.items() if grid is not None}


def _schema() -> Any:
    with needs_extra("TFLite files need", "tensorflow"):
        from tensorflow.lite.python import schema_py_generated
    return schema_py_generated
