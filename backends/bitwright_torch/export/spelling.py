"""What torch's exporter to ONNX doesn't take as it stands: spelled otherwise before, and found out after."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from bitwright.errors import ModelError
from bitwright_torch.graph.model import NAMES, info

aten = torch.ops.aten
_NAMES_OF = {"divide": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub"}
"""Second names, for which the exporter doesn't bring operands of two types to one."""
INLINE = 1024
"""Bytes of the constants whose values types and shapes may depend on."""


def spell(graph: fx.Graph) -> None:
    """Spell calls as the exporter knows them.

    - `table[rows]` as an embedding: Gather in ONNX, whose GatherND backends and runtimes don't quantize;
    - functions by their first names (`torch.divide`);
    - the least and the largest of all values along the one axis of their row;
    - parts of an axis whose size is known at run time only (`torch.chunk(x, 2)` of samples) as slices;
    - a matrix to the power of zero as the identity, once for each matrix.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        packet, overload = node.target.overloadpacket.__name__, node.target._overloadname
        if packet in _NAMES_OF:
            node.target = getattr(getattr(aten, _NAMES_OF[packet]), overload)
        elif node.target in (aten.amin.default, aten.amax.default) and len(node.args) == 1 and not node.kwargs:
            with graph.inserting_before(node):
                node.args = (graph.call_function(aten.flatten.using_ints, node.args), [0])
        elif node.target is aten.index.Tensor:
            _spell_lookup(node)
        elif node.target in (aten.chunk.default, aten.unsafe_chunk.default, aten.split.Tensor):
            _spell_parts(graph, node)
        elif node.target is aten.linalg_matrix_power.default and node.args[1] == 0:
            _spell_identity(graph, node)


def _spell_lookup(node: fx.Node) -> None:
    table, rows = node.args[0], node.args[1]
    if not isinstance(table, fx.Node) or table.op != "get_attr" or not isinstance(rows, list | tuple) or len(rows) != 1:
        return
    (row,) = rows
    kind = info(row).dtype if isinstance(row, fx.Node) and NAMES in row.meta else ""
    if kind in ("int64", "int32") and len(info(table).shape or ()) == 2:
        node.target, node.args = aten.embedding.default, (table, row)


def _spell_parts(graph: fx.Graph, node: fx.Node) -> None:
    """Chunks and splits as slices, which ONNX has for sizes that are computed."""
    given: list[Any] = [*node.args, *node.kwargs.values(), 0]
    source, amount, axis = given[:3]
    if any(u.target is not operator.getitem for u in node.users):
        return
    if node.target is aten.split.Tensor:
        if not isinstance(amount, fx.Node):
            return
        size = amount
    else:
        sizes = info(source).shape
        if sizes is None or sizes[axis] is not None:
            return
        with graph.inserting_before(node):
            whole = graph.call_function(aten.sym_size.int, (source, axis))
            size = graph.call_function(operator.add, (whole, amount - 1))
            size = graph.call_function(operator.floordiv, (size, amount))
    for part in list(node.users):
        place: Any = part.args[1]
        with graph.inserting_before(part):
            ends = [graph.call_function(operator.mul, (size, i)) for i in (place, place + 1)]
        part.target, part.args = aten.slice.Tensor, (source, axis, *ends)


def _spell_identity(graph: fx.Graph, node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    about = info(source)
    if about.shape is None or about.shape[-1] is None:
        return
    with graph.inserting_before(node):
        identity = graph.call_function(aten.eye.default, (about.shape[-1],), {"dtype": getattr(torch, about.dtype)})
    node.target, node.args = aten.expand_as.default, (identity, source)


def refuse_invalid(exported: Any) -> None:
    """Refuse a model whose types don't fit together: no runtime opens its file.

    Raises:
        ModelError: ONNX's own rules are broken; the message names the node.
    """
    import onnx
    import onnx_ir as ir

    kept = [(v, v.const_value) for v in exported.graph.initializers.values() if v.const_value is not None]
    try:
        for value, tensor in kept:
            if tensor.nbytes > INLINE:
                value.const_value = ir.ExternalTensor(
                    "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=value.name
                )
        proto = ir.to_proto(exported)
    finally:
        for value, tensor in kept:
            value.const_value = tensor
    try:
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"torch.onnx can't export the model: what it writes isn't valid ONNX ({reason}). Write the op otherwise "
            "(operands of one type, most often)"
        ) from error
