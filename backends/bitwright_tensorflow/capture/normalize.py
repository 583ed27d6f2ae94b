"""One spelling for what the rest of the backend reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitwright.graph import TensorId, free_name
from bitwright_tensorflow.graph.graphs import Wiring
from bitwright_tensorflow.graph.model import GraphDef, NodeDef
from bitwright_tensorflow.graph.rewriter import constant

_GATHERS = {"ResourceGather": "GatherV2", "ResourceGatherNd": "GatherNd"}


def normalize(graph_def: GraphDef, inputs: Sequence[TensorId], outputs: Sequence[TensorId]) -> None:
    """Rewrite the inference part of a graph that the caller owns, in place.

    Rows of a variable are read as a Gather of its value (`ResourceGather` and `ResourceGatherNd` read the variable
    itself, and leave no tensor that could be quantized). The node keeps its name, and the graph computes the same.
    """
    wiring = Wiring(graph_def)
    taken = set(wiring.nodes)
    for name in [n for n in wiring.order(outputs, inputs) if wiring.nodes[n].op in _GATHERS]:
        node = wiring.nodes[name]
        dtype = node.attr["dtype"].type
        read = NodeDef(name=free_name(f"{name}/ReadVariableOp", taken), op="ReadVariableOp", input=[node.input[0]])
        read.attr["dtype"].type = dtype
        added = [read]
        batch_dims, indices = node.attr["batch_dims"].i, node.attr["Tindices"].type
        controls = [i for i in node.input if i.startswith("^")]
        operands = [read.name, node.input[1]]
        node.op, by_rows = _GATHERS[node.op], node.op == "ResourceGather"
        node.attr.clear()
        node.attr["Tparams"].type, node.attr["Tindices"].type = dtype, indices
        if by_rows:
            axis = constant(free_name(f"{name}/axis", taken), np.array(0, np.int32), "int32")
            node.attr["Taxis"].type = axis.attr["dtype"].type
            node.attr["batch_dims"].i = batch_dims
            operands.append(axis.name)
            added.append(axis)
        taken |= {each.name for each in added}
        del node.input[:]
        node.input.extend([*operands, *controls])
        graph_def.node.extend(added)
