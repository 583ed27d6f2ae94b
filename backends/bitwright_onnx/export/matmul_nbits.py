"""ONNX Runtime's MatMulNBits: products with stored matrices of 4 or 8 bits, with the accuracy that the user chooses.

In a QDQ file such a matrix is a DequantizeLinear, which ONNX Runtime turns into this operator itself, at an accuracy of
its own choice. Here it is written out, so that the choice is the file's.
Source: ONNX Runtime's ContribOperators.md, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bitwright.backend import Pair, ToCompile
from bitwright.errors import ModelError
from bitwright.graph import ParamId
from bitwright_onnx.capture.writing import save_model
from bitwright_onnx.export.qdq_pairs import contents_of
from bitwright_onnx.graph.tensors import tensor_array

OP, DOMAIN = "MatMulNBits", "com.microsoft"
CODES = "_nbits"
"""What the name of a packed matrix ends in."""
_WIDTHS = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT8: 8, ir.DataType.UINT8: 8}
_BLOCKS = (128, 64, 32, 16)
"""Sizes for matrices with one scale a column; any larger power of two serves as well, and none serves better."""


class MatMulNBits:
    """The quantized model with its stored matrices in MatMulNBits; all else is as in the QDQ file.

    A matrix (K, N) is ``B`` uint8 (N, blocks, bytes of a block), the first code in the lowest bits; ``scales`` float32
    (N · blocks); ``zero_points`` uint8 (N, bytes), left out where all are the middle code. Matrices that other ops read
    too stay as they are, so that none is stored twice.
    """

    class Settings(BaseModel):
        """What users may choose.

        Attributes:
            accuracy_level: least accuracy of the products: 1 float32, 2 float16, 3 bfloat16, 4 int8 (inputs are rounded
                to 8 bits, a scale for each block; fastest on CPUs), 0 the kernel's own choice. 1 computes what was
                simulated.
        """

        model_config = ConfigDict(extra="forbid")

        accuracy_level: int = Field(1, ge=0, le=4)

    def check(self, model: ToCompile, settings: Settings) -> None:
        """Nothing is refused: what doesn't fit stays a DequantizeLinear."""

    def write(self, model: ToCompile, path: Path, settings: Settings) -> Path:
        """See `FormatWriter.write`.

        Raises:
            ModelError: no product has a matrix of 4 or 8 bits.
        """
        opened = ir.load(model.bundle.files["qdq"])
        graph = opened.graph
        made = [_replaced(graph, node, settings.accuracy_level) for node in list(graph)]
        if not any(made):
            raise ModelError(
                "matmul_nbits: no product of the model has a stored matrix of 4 or 8 bits for itself; choose such "
                "weights (weights='int4:block32'), or leave the format out"
            )
        opened.opset_imports[DOMAIN] = 1
        graph.sort()
        return save_model(opened, path)

    def read(self, model: ToCompile, path: Path) -> Iterable[tuple[ParamId, NDArray[np.float32]]]:
        """See `FormatWriter.read`."""
        for node in ir.load(path).graph:
            if node.op_type == OP and node.domain == DOMAIN:
                held = node.inputs[1]
                assert held is not None
                yield str(held.name).removesuffix(CODES), _values(node)
        for name, pairs in contents_of(path).pairs.items():
            if name in model.graph.params:
                yield name, _dequantized(pairs[0])


def _replaced(graph: ir.Graph, node: ir.Node, accuracy: int) -> bool:
    """Replace a product whose second operand is a stored matrix; whether it was one."""
    found = _matrix(node)
    if found is None:
        return False
    reader, codes, scale, zero = found
    columns, rows = codes.shape
    blocks = len(scale)
    bits = _WIDTHS[reader.inputs[0].const_value.dtype]  # type: ignore[union-attr]
    name = str(reader.outputs[0].name)
    packed = codes.T.reshape(rows, blocks, -1)
    if bits == 4:
        packed = packed[..., ::2] | (packed[..., 1::2] << 4)
    operands: list[tuple[str, NDArray[Any]]] = [
        (CODES, np.ascontiguousarray(packed, np.uint8)),
        ("_nbits_scales", scale.T.reshape(-1).astype(np.float32)),
    ]
    if (zero != 2 ** (bits - 1)).any():
        points = zero.T
        if bits == 4:
            points = np.pad(points, ((0, 0), (0, blocks % 2)))
            points = points[:, ::2] | (points[:, 1::2] << 4)
        operands.append(("_nbits_zero_points", np.ascontiguousarray(points, np.uint8)))
    values = [node.inputs[0], *(_constant(graph, f"{name}{ending}", array) for ending, array in operands)]
    attributes = {
        "K": columns, "N": rows, "bits": bits, "block_size": columns // blocks, "accuracy_level": accuracy,
    }  # fmt: skip
    product = ir.node(OP, values, attributes=attributes, domain=DOMAIN, name=f"{node.name}{CODES}")
    added = [product]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        added.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}_bias"))
    ir.convenience.replace_nodes_and_values(graph, node, [node], added, node.outputs, added[-1].outputs)
    read = tuple(reader.inputs)
    graph.remove(reader, safe=True)
    for unused in read:
        if unused is not None and not unused.uses() and unused.is_initializer():
            graph.initializers.pop(str(unused.name), None)
    return True


_Matrix = tuple[ir.Node, NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]


def _matrix(node: ir.Node) -> _Matrix | None:
    """The DequantizeLinear of a product's second operand, with codes (K, N), and scales and zero points (blocks, N);
    codes and zero points are counted from the lowest code. None where the operator can't take it."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain != "" or len(node.inputs) < 2:
        return None
    turned = False
    if node.op_type == "Gemm":
        plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if not plain or node.attributes.get_int("transA"):
            return None
        turned = node.attributes.get_int("transB") == 1
    value = node.inputs[1]
    reader = None if value is None else value.producer()
    if reader is None or value is None or reader.op_type != "DequantizeLinear":
        return None
    if len(value.uses()) > 1 or value.is_graph_output():
        return None  # another op reads it: a second form would be stored beside the first
    held = [v if v is None else v.const_value for v in reader.inputs]
    if any(h is None for h in held[:2]) or held[0].dtype not in _WIDTHS or len(held[0].shape) != 2:  # type: ignore[union-attr]
        return None
    codes = np.asarray(tensor_array(held[0])).astype(np.int64)  # type: ignore[arg-type]
    scale = np.asarray(tensor_array(held[1]), np.float32)  # type: ignore[arg-type]
    zero = np.zeros(scale.shape, np.int64)
    if len(held) > 2 and held[2] is not None:
        zero = np.asarray(tensor_array(held[2])).astype(np.int64)
    axis = int(reader.attributes.get_int("axis", 1) or 0) % 2
    size = int(reader.attributes.get_int("block_size", 0) or 0)
    if turned:
        codes, axis = codes.T, 1 - axis
        scale, zero = (scale.T, zero.T) if scale.ndim == 2 else (scale, zero)
    columns, rows = codes.shape
    if size:
        if axis != 0 or size < 16 or size & (size - 1):
            return None
    else:
        size = next((b for b in _BLOCKS if columns % b == 0), 0)
        if not size or (scale.ndim == 1 and axis != 1):
            return None
        shape = (columns // size, rows)
        scale, zero = np.broadcast_to(scale.reshape(1, -1), shape), np.broadcast_to(zero.reshape(1, -1), shape)
    low = 0 if held[0].dtype in (ir.DataType.UINT4, ir.DataType.UINT8) else -(2 ** (_WIDTHS[held[0].dtype] - 1))  # type: ignore[union-attr]
    return reader, codes - low, scale, zero - low


def _constant(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor)
    graph.register_initializer(made)
    return made


def _values(node: ir.Node) -> NDArray[np.float32]:
    """The matrix of a MatMulNBits, (N, K)."""
    integer: Callable[[str], int] = lambda name: int(node.attributes.get_int(name) or 0)
    columns, rows, bits, size = (integer(name) for name in ("K", "N", "bits", "block_size"))
    held = [np.asarray(v.const_value.numpy()) for v in node.inputs[1:] if v is not None and v.const_value is not None]
    blocks = columns // size
    codes, scale = held[0].reshape(rows, -1), held[1].reshape(rows, blocks)
    zero = np.full((rows, blocks), 2 ** (bits - 1), np.uint8)
    if len(held) > 2:
        zero = held[2].reshape(rows, -1)
        zero = _nibbles(zero)[:, :blocks] if bits == 4 else zero
    codes = _nibbles(codes) if bits == 4 else codes
    steps = codes.reshape(rows, blocks, size).astype(np.int32) - zero[..., None].astype(np.int32)
    return np.asarray((steps.astype(np.float32) * scale[..., None]).reshape(rows, columns), np.float32)


def _nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def _dequantized(pair: Pair) -> NDArray[np.float32]:
    """The values of a stored parameter, in canonical layout."""
    assert pair.codes is not None
    codes = np.asarray(pair.codes())
    scale, zero = np.asarray(pair.scale, np.float32), np.asarray(pair.zero_point)
    if pair.block_axis is not None:
        scale, zero = (np.repeat(a, pair.block_size, axis=pair.block_axis) for a in (scale, zero))
    steps = codes if pair.float_format is not None else codes - zero
    return np.asarray(steps.astype(np.float32) * scale, np.float32)
