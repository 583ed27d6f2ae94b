"""One spelling for what the rest of the backend reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitwright.graph import TensorId, free_name
from bitwright_tensorflow.graph.graphs import Wiring
from bitwright_tensorflow.graph.model import GraphDef, NodeDef
from bitwright_tensorflow.graph.rewriter import constant


def normalize(graph_def: GraphDef, inputs: Sequence[TensorId], outputs: Sequence[TensorId]) -> None:
    """Rewrite the inference part of a graph that the caller owns, in place.

    Rows of a variable are read as a Gather of its value (`ResourceGather` reads the variable itself, and leaves no
    tensor that could be quantized). The node keeps its name, and the graph computes the same.
    """
    wiring = Wiring(graph_def)
    taken = set(wiring.nodes)
    gathers = [n for n in wiring.order(outputs, inputs) if wiring.nodes[n].op == "ResourceGather"]
    for name in gathers:
        node = wiring.nodes[name]
        dtype = node.attr["dtype"].type
        read = NodeDef(name=free_name(f"{name}/ReadVariableOp", taken), op="ReadVariableOp", input=[node.input[0]])
        read.attr["dtype"].type = dtype
        axis = constant(free_name(f"{name}/axis", taken), np.array(0, np.int32), "int32")
        taken |= {read.name, axis.name}
        batch_dims, indices = node.attr["batch_dims"].i, node.attr["Tindices"].type
        controls = [i for i in node.input if i.startswith("^")]
        operand = node.input[1]
        node.op = "GatherV2"
        del node.input[:]
        node.input.extend([read.name, operand, axis.name, *controls])
        node.attr.clear()
        node.attr["Tparams"].type, node.attr["Tindices"].type = dtype, indices
        node.attr["Taxis"].type = axis.attr["dtype"].type
        node.attr["batch_dims"].i = batch_dims
        graph_def.node.extend([read, axis])
