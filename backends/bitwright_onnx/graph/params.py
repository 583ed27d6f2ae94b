"""Parameter values in and out of the model, in canonical layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.backend import checked_param, no_param
from bitwright.files import is_spilled
from bitwright.graph import ParamId
from bitwright_onnx.graph.operands import canonical_shape, layout_of, parameters
from bitwright_onnx.graph.optable import FLOAT_TYPES, constant_shape, turns_weight
from bitwright_onnx.graph.tensors import tensor_array


def read_params(model: ir.Model, ids: Collection[ParamId]) -> dict[ParamId, NDArray[np.float32]]:
    """Values in canonical layout, float32.

    Raises:
        ModelError: an id names no float parameter.
    """
    return {id: to_canonical(_parameter(model, id)) for id in ids}


def write_params(model: ir.Model, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
    """Set values given in canonical layout, in place; they are stored in the parameter's own dtype and layout.

    Raises:
        ModelError: an id names no float parameter, a shape differs, or a value isn't finite. Nothing is set then.
    """
    for id, tensor in native_tensors(model, values).items():
        model.graph.initializers[id].const_value = tensor


def native_tensors(model: ir.Model, values: Mapping[ParamId, NDArray[np.floating]]) -> dict[ParamId, ir.TensorProtocol]:
    """Values given in canonical layout, in the parameters' own dtypes and layouts.

    Raises:
        ModelError: as `write_params`.
    """
    return {id: _native_tensor(_parameter(model, id), np.asarray(array)) for id, array in values.items()}


def to_canonical(value: ir.Value) -> NDArray[np.float32]:
    """An initializer's values as its op sees them in canonical layout."""
    assert value.const_value is not None
    array = tensor_array(value.const_value)
    layout, shape = canonical_form(value)
    with np.errstate(over="ignore"):  # the lowest double, in a mask, is −∞
        return np.asarray(array.transpose(layout).reshape(shape), np.float32, order="C")  # keeps scalars scalar


def _native_tensor(value: ir.Value, given: np.ndarray) -> ir.TensorProtocol:
    assert value.const_value is not None
    layout, shape = canonical_form(value)
    array = checked_param(str(value.name), given, shape)
    native = constant_shape(value)
    dtype, name = value.const_value.dtype, value.name

    def made() -> ir.TensorProtocol:
        permuted = array.reshape(tuple(native[i] for i in layout))
        back = np.asarray(permuted.transpose(np.argsort(layout)), order="C")
        return ir.Tensor(back.astype(dtype.numpy()), dtype=dtype, name=name)

    # What lies on disk is read from there whenever it is needed.
    return ir.LazyTensor(made, dtype, ir.Shape(native), name=name) if is_spilled(given) else made()


def _parameter(model: ir.Model, id: ParamId) -> ir.Value:
    value = model.graph.initializers.get(id)
    if value is None or value.const_value is None or value.const_value.dtype not in FLOAT_TYPES:
        raise no_param(id)
    return value


def canonical_form(value: ir.Value) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Native axis of each canonical axis, and the canonical shape, as the first op that has a role for it sees it."""
    assert value.const_value is not None
    native = constant_shape(value)
    graph = value.graph
    for node, index in _uses_in_order(value):
        owner = node
        if turns_weight(node):
            owner = next(iter(node.outputs[0].uses())).node
        if node.op_type == "Add":
            # The bias of a MatMul sits in the Add behind it.
            other = node.inputs[1 - index] if len(node.inputs) == 2 else None
            before = other.producer() if other is not None else None
            if before is not None and before.op_type == "MatMul":
                owner = before
        for role, place in (parameters(owner) if node.graph is graph else {}).items():
            if place == (node, index):
                return layout_of(node, role, len(native)), canonical_shape(node, role, native)
    return tuple(range(len(native))), native


def _uses_in_order(value: ir.Value) -> list[tuple[ir.Node, int]]:
    uses: list[tuple[ir.Node, int]] = [(use.node, use.idx) for use in value.uses()]
    if len(uses) < 2 or value.graph is None:
        return uses
    order = {node: i for i, node in enumerate(value.graph)}
    return sorted(uses, key=lambda use: order.get(use[0], len(order)))
