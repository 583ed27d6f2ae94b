"""Which ops the exact integer simulation computes as the runtime does, to the last bit, and why not the others.

Covered are integer kernels whose order of roundings is known (8-bit operands), ops that only move codes, and float
functions of values on a grid that IEEE arithmetic rounds once, so that every implementation gives the same bits.
Whatever sums, exponentiates or interpolates in float may differ in a last bit from one implementation (or one place
in a graph) to the next, and a value that lies between two codes then becomes the other one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bitwright.graph import LINEAR_KINDS, Graph, Op, OpId, OpKind, PoolAttrs, TensorId, preserves_grid
from bitwright.grids import Encoding

ROUNDED_ONCE = frozenset(
    """
    Abs Add Ceil Clip Concat Div Floor LeakyRelu Max Min Mul Neg PRelu Pad Relu Round Sign Sqrt Sub Where
    """.split()  # noqa: SIM905
)
"""Functions of their operands alone, each value rounded once (ONNX operator specification; IEEE 754)."""


def uncovered(
    graph: Graph, table: Mapping[str, Encoding], kernels: Collection[OpId], fused_away: Collection[OpId] = ()
) -> dict[OpId, str]:
    """Ops that the exact integer simulation may compute otherwise than ONNX Runtime → the reason, in words.

    Args:
        graph, table: of the simulation; `table` has one encoding for every quantized site.
        kernels: ops that it runs with its integer kernels.
        fused_away: ops that such a kernel does with its own.
    """
    found: dict[OpId, str] = {}
    for op in graph.ops:
        if op.id in fused_away or not any(graph.tensors[t].is_float for t in op.outputs if t in graph.tensors):
            continue
        reason = _other_types(graph, op) or (
            _kernel(graph, op, table) if op.id in kernels else _function(graph, op, table)
        )
        if reason is not None:
            found[op.id] = reason
    return found


def _other_types(graph: Graph, op: Op) -> str | None:
    types = {graph.tensors[t].dtype for t in (*op.data_inputs, *op.outputs) if t in graph.tensors}
    other = sorted(t for t in types if t.startswith(("float", "bfloat")) and t != "float32")
    return f"{op.type} in {other[0]} arithmetic" if other else None


def _kernel(graph: Graph, op: Op, table: Mapping[str, Encoding]) -> str | None:
    """Why an integer kernel of the simulation isn't the runtime's."""
    operands = (*op.data_inputs, *op.params.values()) if op.kind in (OpKind.ADD, OpKind.MUL) else op.data_inputs
    for site in operands:
        if not _is_byte(table.get(site)):
            return f"the runtime has no {op.type} kernel for {_bits(table.get(site))} codes and computes it in float"
    if op.kind in LINEAR_KINDS:
        weight = table.get(op.weight or "")
        if op.kind is OpKind.CONV_TRANSPOSE:
            return "the runtime computes ConvTranspose in float"
        if weight is None or not 5 <= weight.bits <= 8:
            return f"the runtime computes {op.type} with {_bits(weight)} weights in float"
    if op.kind is OpKind.SOFTMAX:
        return "the runtime's table of exponentials may differ in a last bit"
    if op.kind is OpKind.AVERAGE_POOL:
        attrs = op.attrs
        if isinstance(attrs, PoolAttrs) and attrs.window is not None and any(d != 1 for d in attrs.window.dilations):
            return "the runtime averages windows with gaps in float"
        if op.type == "ReduceMean":
            return "the runtime computes ReduceMean in float"
    return None


def _function(graph: Graph, op: Op, table: Mapping[str, Encoding]) -> str | None:
    """Why the float form of an op isn't sure to round as the runtime's does."""
    if preserves_grid(op) or op.kind is OpKind.EMBEDDING:
        return None
    if op.kind is OpKind.OPAQUE or op.type not in ROUNDED_ONCE:
        return f"{op.native or op.type} runs in float"
    known = {*graph.inputs, *(t for t in op.data_inputs if _on_grid(t, table))}
    loose = [t for t in op.data_inputs if t not in known and t in graph.tensors and graph.tensors[t].is_float]
    return f"{op.type} reads {loose[0]!r}, which is in float" if loose else None


def _on_grid(tensor: TensorId, table: Mapping[str, Encoding]) -> bool:
    encoding = table.get(tensor)
    return encoding is not None and encoding.is_fixed


def _is_byte(encoding: Encoding | None) -> bool:
    return encoding is not None and encoding.is_fixed and 5 <= encoding.bits <= 8


def _bits(encoding: Encoding | None) -> str:
    return "float" if encoding is None else encoding.float_format or f"{encoding.bits}-bit"
