"""Matrices that a captured graph reads in two layouts: a parameter has one, so each layout reads a tensor of its own.

`F.linear(x, w)` takes the rows of w as outputs, `x @ w` its columns, an embedding or einsum takes w as it is. Grids
(a scale for each output) and moments are in terms of the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from bitwright_torch.graph.constants import constant_nodes
from bitwright_torch.graph.model import tensor_of
from bitwright_torch.graph.modes import is_flag

aten = torch.ops.aten
_COLUMNS: Mapping[Any, int] = {aten.matmul.default: 1, aten.mm.default: 1, aten.addmm.default: 2}
"""Ops whose outputs are the columns of a matrix, and where they have it."""
_ROWS: Mapping[Any, int] = {aten.linear.default: 1, aten.embedding.default: 0}
"""Ops that take its rows."""


def outputs_are_rows(user: fx.Node, matrix: fx.Node) -> bool:
    """Whether an op reads a matrix as it is stored, (out, in), and not as (in, out)."""
    place = _COLUMNS.get(user.target)
    return place is None or len(user.args) <= place or user.args[place] is not matrix


def split_layouts(graph: fx.Graph, holder: nn.Module) -> None:
    """Let ops that read a model's matrix in another layout than the others read a copy, in place.

    The copy is computed in the graph, so that training reaches the matrix through both. The layers keep the matrix
    itself; where none is one, the products with its columns do.
    """
    constants = constant_nodes(graph)
    for node in list(graph.nodes):
        if node.op != "get_attr" or is_flag(node):
            continue
        tensor = tensor_of(holder, str(node.target))
        if tensor.ndim != 2 or not tensor.is_floating_point():
            continue
        users = [u for u in node.users if u not in constants and u.op == "call_function"]
        rows = [u for u in users if outputs_are_rows(u, node)]
        columns = [u for u in users if u not in rows]
        if not rows or not columns:
            continue
        layers = [u for u in rows if (place := _ROWS.get(u.target)) is not None and u.args[place] is node]
        with graph.inserting_after(node):
            copied = graph.call_function(aten.clone.default, (node,))
        copied.meta = {"val": tensor}
        for user in columns if layers else rows:
            user.replace_input_with(node, copied)
