"""Reads back which tensors of a QDQ model pass through quantize/dequantize pairs: on which grids, with which codes.

Parameters are put in the place of their DequantizeLinear again (without values), so that their ops show which layout
they have. A stored integer tensor that is dequantized counts as a pair: it was quantized when the file was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.backend import Pair
from bitwright.errors import ModelError
from bitwright.graph import ParamId, TensorId
from bitwright_onnx.capture.data_files import read_model
from bitwright_onnx.export.qdq import FORMS, NAMES
from bitwright_onnx.graph.optable import FLOAT_TYPES
from bitwright_onnx.graph.params import canonical_form, to_canonical
from bitwright_onnx.graph.tensors import tensor_array
from bitwright_onnx.simulate.site_ops import FLOAT_TYPES as FORMATS

_FORMATS = {dtype: name for name, dtype in FORMATS.items()}


@dataclass
class QdqContents:
    """What a QDQ file holds.

    Attributes:
        pairs: tensor → each pair that it passes through.
        floats: parameters in float → what hands out their values, in canonical layout.
    """

    pairs: dict[TensorId, list[Pair]] = field(default_factory=dict)
    floats: dict[ParamId, Callable[[], NDArray[np.float32]]] = field(default_factory=dict)


def contents_of(path: Path) -> QdqContents:
    """Read a QDQ file back.

    Raises:
        ModelError: the file can't be read, or a scale or zero point isn't constant.
    """
    try:
        model = read_model(path)
    except Exception as error:
        raise ModelError(f"can't read {str(path)!r}: {error}") from error
    graph = model.graph
    kept = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
    sites = {str(name): str(site) for site, name in _metadata(model, NAMES).items()}
    sites |= {str(name): str(site) for name, site in _metadata(model, FORMS).items()}
    found = QdqContents()
    operands: set[str] = set()
    restored: list[tuple[TensorId, ir.Node, ir.Value]] = []
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        cast = _is_written(node) and source is not None and source.is_initializer()
        if node.op_type == "QuantizeLinear":
            operands.update(str(v.name) for v in node.inputs[1:] if v is not None)
        if node.op_type != "DequantizeLinear" and not cast:
            continue
        operands.update(str(v.name) for v in node.inputs if v is not None and v.is_initializer())
        value = _final(node.outputs[0])
        name = sites.get(str(value.name), _name(str(value.name), kept))
        if source is not None and source.is_initializer():
            restored.append((name, node, _restored(graph, value, source)))
        elif source is not None and _at_run_time(source):
            continue
        elif not _passed_by(source, value):
            found.pairs.setdefault(name, []).append(_activation(node, path))
    for name, node, parameter in restored:
        found.pairs.setdefault(name, []).append(_parameter(node, parameter, path))
    made = {parameter for _, _, parameter in restored}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if name not in operands and value not in made and tensor is not None and tensor.dtype in FLOAT_TYPES:
            found.floats[name] = _reader(value)
    return found


def _passed_by(source: ir.Value | None, value: ir.Value) -> bool:
    """Whether a pair is there for nothing: what it gives nobody reads, and what it quantizes is read as it was."""
    if value.uses() or value.is_graph_output():
        return False
    while source is not None and (node := source.producer()) is not None and _of_pair(node):
        source = node.inputs[0]
    return source is not None and any(not _of_pair(user) for user, _ in source.uses())


def _at_run_time(quantized: ir.Value) -> bool:
    """Whether codes are of a grid whose numbers are found at run time: a pair without any."""
    producer = quantized.producer()
    return producer is not None and producer.op_type == "DynamicQuantizeLinear"


def _of_pair(node: ir.Node) -> bool:
    return "_qdq/" in str(node.name) or node.op_type == "QuantizeLinear"


def _metadata(model: ir.Model, key: str) -> Mapping[str, Any]:
    held = json.loads(model.metadata_props.get(key, "{}"))
    return held if isinstance(held, dict) else {}


def _reader(value: ir.Value) -> Callable[[], NDArray[np.float32]]:
    return lambda: to_canonical(value)


def _final(value: ir.Value) -> ir.Value:
    """The tensor that readers see: in float16 models the writer casts back from float32, as a part of the pair."""
    while len(users := [user for user, _ in value.uses()]) == 1 and _is_written(users[0]):
        value = users[0].outputs[0]
    return value


def _name(name: str, kept: Collection[str]) -> str:
    """The quantized tensor's name; what keeps its own name beside the pair is read under another."""
    own = name.removesuffix("_dequantized")
    return own if own in kept else name


def _is_written(node: ir.Node) -> bool:
    return node.op_type == "Cast" and ("_qdq/" in str(node.name) or "_dq/" in str(node.name))


def _restored(graph: ir.Graph, value: ir.Value, source: ir.Value) -> ir.Value:
    """A float initializer, all zeros, in the place of a dequantized one."""
    assert source.const_value is not None
    shape = tuple(int(d) for d in source.const_value.shape.numpy())
    blank = ir.Tensor(np.broadcast_to(np.float32(0), shape), name=f"{value.name}/restored")
    made = ir.Value(name=blank.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape), const_value=blank)
    graph.register_initializer(made)
    for user, index in list(value.uses()):
        user.replace_input_with(index, made)
    return made


def _activation(node: ir.Node, path: Path) -> Pair:
    scale, zero, kind = _numbers(node, path)
    axis = node.attributes.get_int("axis", 1) if scale.ndim else None
    return Pair(scale, zero, *_stored(kind), axis=axis)


def _parameter(node: ir.Node, restored: ir.Value, path: Path) -> Pair:
    """A stored parameter, its numbers brought into canonical layout."""
    source = node.inputs[0]
    assert source is not None and source.const_value is not None
    tensor = source.const_value
    layout, shape = canonical_form(restored)
    native = tuple(int(d) for d in tensor.shape.numpy())
    bits, signed, float_format = _stored(tensor.dtype)

    def codes() -> NDArray[Any]:
        values = tensor_array(tensor)
        values = values.astype(np.float32) if float_format else values.astype(np.int64)
        return np.asarray(values.transpose(layout).reshape(shape))

    if node.op_type == "Cast":
        return Pair(np.asarray(1, np.float32), np.zeros((), np.int64), bits, signed, float_format, codes=codes)
    scale, zero, _ = _numbers(node, path)
    if scale.ndim == 0:
        return Pair(scale, zero, bits, signed, float_format, codes=codes)
    axis = int(node.attributes.get_int("axis", 1) or 0) % len(native)
    size = int(node.attributes.get_int("block_size", 0) or 0)
    if size:
        return Pair(
            scale.transpose(layout), zero.transpose(layout), bits, signed, float_format,
            block_axis=layout.index(axis), block_size=size, codes=codes,
        )  # fmt: skip
    place = [-1 if i == axis else 1 for i in range(len(native))]
    turned: list[NDArray[Any]] = [v.reshape(place).transpose(layout) for v in (scale, zero)]
    if len(shape) != len(native):  # axes of length 1 that the canonical form leaves out
        turned = [np.broadcast_to(v, tuple(native[i] for i in layout)).reshape(shape) for v in turned]
    return Pair(turned[0], turned[1], bits, signed, float_format, codes=codes)


def _numbers(node: ir.Node, path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64], ir.DataType]:
    """Scale, zero point and stored type."""
    held: list[Any] = []
    for what, value in zip(("scale", "zero point"), (*node.inputs[1:3], None), strict=False):
        if value is not None and value.const_value is None:
            raise ModelError(f"{path.name}: the {what} of {node.name!r} isn't constant")
        held.append(None if value is None else value.const_value)
    scale = np.asarray(held[0].numpy(), np.float32)
    source = node.inputs[0]
    assert source is not None
    kind = held[1].dtype if held[1] is not None else source.dtype or ir.DataType.UINT8
    zero = np.zeros(scale.shape, np.int64)
    if held[1] is not None and kind.is_integer():
        zero = np.asarray(held[1].numpy()).astype(np.int64)
    return scale, zero, kind


def _stored(kind: ir.DataType) -> tuple[int, bool, str | None]:
    return int(kind.bitwidth), not kind.name.startswith("U"), _FORMATS.get(kind)
