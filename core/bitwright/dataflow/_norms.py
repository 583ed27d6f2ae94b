"""Layer and RMS normalizations that a model spells out, made one op; `bitwright.graph` finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitwright.dataflow._layouts import Layout
from bitwright.dataflow._nodes import Node, Nodes, ValueId
from bitwright.dataflow._recognize import merged
from bitwright.graph import COMPOSITES, AxisAttrs, Composite, Graph, OpId, OpKind, ParamRole, PoolAttrs

_NORMS = ("LayerNormalization", "RMSNormalization")


def norms_merged(graph: Graph, nodes: Nodes, node_of: Mapping[OpId, Sequence[Node]]) -> tuple[Nodes, bool]:
    """The nodes with one for each normalization over the last axis.

    Args:
        graph: of the nodes.
        nodes: that the graph was made of.
        node_of: those of each op.
    """
    changed = False
    for type in _NORMS:
        for composite in COMPOSITES[type](graph):
            members = [node for op in composite.ops for node in node_of[op.id]]
            known = {id(node) for node in nodes}
            made = _norm(graph, nodes, composite, members) if all(id(m) in known for m in members) else None
            found = None if made is None else merged(nodes, members, made)
            if found is not None:
                nodes, changed = found, True
    return nodes, changed


def _norm(graph: Graph, nodes: Nodes, composite: Composite, members: Sequence[Node]) -> Node | None:
    """One node for it; None where it has more than a scale, a shift and an ε, or isn't over the last axis."""
    rank = len(graph.tensors[composite.source].shape or ())
    means = [op for op in composite.ops if op.kind is OpKind.AVERAGE_POOL]
    axes = {op.attrs.axes if isinstance(op.attrs, PoolAttrs) else () for op in means}
    if not means or axes - {(rank - 1,), (-1,)}:
        return None
    inputs = {v for m in members for v in m.present if not nodes.values[v].known}
    inputs -= {v for m in members for v in m.outputs}
    if len(inputs) != 1:
        return None
    (x,) = inputs
    width = nodes.values[x].shape[-1]
    vectors: dict[ParamRole, ValueId] = {}
    epsilon: float | None = None
    for member in members:
        for value in member.present:
            if not nodes.values[value].known:
                continue
            number, array = nodes.number(value), nodes.values[value].array
            vector = array is not None and array.size == width and array.shape[-1:] == (width,)
            role = {"Mul": ParamRole.GAMMA, "Add": ParamRole.BETA}.get(member.type)
            if number is not None and (member.type != "Add" or array is None or array.ndim == 0 or array.size == 1):
                if member.type == "Add":
                    epsilon = number if epsilon is None else -1.0
                elif member.type not in ("Max", "Pow", "Mul", "Div"):
                    return None
            elif role is not None and vector and role not in vectors and nodes.root(value) is not None:
                vectors[role] = value
            else:
                return None
    if epsilon is None or epsilon < 0:
        return None
    rms = composite.type == "RMSNormalization"
    if rms and ParamRole.BETA in vectors:
        return None
    roles = (ParamRole.GAMMA,) if rms else (ParamRole.GAMMA, ParamRole.BETA)
    operands: list[ValueId | None] = [x]
    layouts = {}
    for role in roles:
        vector_id = vectors.get(role)
        array = None if vector_id is None else nodes.values[vector_id].array
        if array is not None:
            layouts[len(operands)] = Layout().reshaped(array.shape, (array.size,))
        operands.append(vector_id)
    while operands[-1] is None:
        operands.pop()
    attributes = {"axis": -1, "epsilon": epsilon}
    return Node(composite.type, tuple(operands), members[-1].outputs, (), attributes, AxisAttrs(-1), layouts,
                native="rms_norm" if rms else "layer_norm")  # fmt: skip
