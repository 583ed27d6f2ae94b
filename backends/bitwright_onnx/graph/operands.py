"""Parameters of ops: which initializer has which role, and how its native layout maps to the canonical one."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from bitwright.graph import CONSTANT_KINDS, KINDS, OpKind, Param, ParamRole
from bitwright_onnx.graph.optable import (
    OPERANDS,
    bias_add,
    constant_shape,
    flag,
    is_default_domain,
    is_float_constant,
    linear_weight,
    plain_bias,
    turned,
)


def parameters(node: ir.Node) -> Mapping[ParamRole, tuple[ir.Node, int]]:
    """Where each parameter of an op sits: role → (node, operand index).

    A MatMul's bias sits in its Add, a weight that it reads transposed in its Transpose.
    """
    if not is_default_domain(node):
        return {}
    if node.op_type == "MatMul" and linear_weight(node) is not None:
        found = {ParamRole.WEIGHT: (node, 1) if (turn := turned(node)) is None else (turn, 0)}
        if (add := bias_add(node)) is not None:
            found[ParamRole.BIAS] = (add, 0 if is_float_constant(add.inputs[0]) else 1)
        return found
    if node.op_type in ("Conv", "ConvTranspose") and linear_weight(node) is None:
        return {}
    if node.op_type == "Gemm" and (linear_weight(node) is None or not plain_bias(node)):
        constants = [i for i in (0, 1) if is_float_constant(node.inputs[i])]
        return {ParamRole.CONSTANT: (node, constants[0])} if len(constants) == 1 else {}
    if node.op_type == "Gather":
        return {ParamRole.WEIGHT: (node, 0)} if is_embedding(node) else {}
    if node.op_type in OPERANDS:
        slots = {role: i for i, role in OPERANDS[node.op_type].items() if i < len(node.inputs)}
        return {role: (node, i) for role, i in slots.items() if is_float_constant(node.inputs[i])}
    if KINDS.get(node.op_type) in CONSTANT_KINDS:
        constants = [i for i, v in enumerate(node.inputs) if is_float_constant(v)]
        if constants and len(constants) < len([v for v in node.inputs if v is not None]):
            return {ParamRole.CONSTANT: (node, constants[0])}
    return {}


def is_embedding(node: ir.Node) -> bool:
    """A Gather of rows of a constant float table."""
    table = node.inputs[0] if node.op_type == "Gather" else None
    if table is None or not is_float_constant(table):
        return False
    return not node.attributes.get_int("axis", False) and len(constant_shape(table)) == 2


def layout_of(node: ir.Node, role: ParamRole, rank: int) -> tuple[int, ...]:
    """Native axis of each canonical axis. ONNX's convolutions are canonical; matrices are (in, out) but for transB."""
    natural = tuple(range(rank))
    if role is ParamRole.WEIGHT and rank == 2:
        if node.op_type == "MatMul":
            return (1, 0)
        if node.op_type == "Gemm" and not flag(node, "transB"):
            return (1, 0)
    return natural


def canonical_shape(node: ir.Node, role: ParamRole, native: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the canonical layout; biases and slopes that carry axes of length 1 lose them."""
    layout = layout_of(node, role, len(native))
    shape = tuple(native[i] for i in layout)
    if role in (ParamRole.BIAS, ParamRole.SLOPE) and KINDS.get(node.op_type) is not OpKind.RECURRENT:
        wide = tuple(d for d in shape if d != 1)
        return wide if len(wide) == 1 else (1,) if not wide else shape
    return shape


def slope_axis(node: ir.Node) -> int | None:
    """The axis of x, from the back, that a slope with one axis longer than 1 is broadcast along; None for others."""
    slope = node.inputs[1]
    if slope is None:
        return None
    lengths = constant_shape(slope)
    wide = [i - len(lengths) for i, d in enumerate(lengths) if d != 1]
    return wide[0] if len(wide) == 1 else None


def describe(node: ir.Node, role: ParamRole, value: ir.Value) -> Param:
    """The parameter that `value` is to an op."""
    assert value.const_value is not None and value.name is not None
    native = constant_shape(value)
    shape = canonical_shape(node, role, native)
    layout = layout_of(node, role, len(native)) if len(shape) == len(native) else None
    return Param(value.name, shape, dtype_name(value.const_value.dtype), layout)


def dtype_name(dtype: ir.DataType | None) -> str:
    """Name as the core writes it ("float32"); a type that nobody could infer is taken for float32."""
    if dtype is None:
        return "float32"
    return {"float": "float32", "double": "float64"}.get(dtype.name.lower(), dtype.name.lower())
