"""Weights of recurrent layers in exported ONNX models: under their own names, in ONNX's order of gates.

The exporter computes them, gate by gate, from PyTorch's parameters (i, f, g, o becomes i, o, f, c; a leading axis for
the direction). Folded, they would be constants without a name, and their sites and encodings without a tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

OPERANDS = {"LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2)}
"""ONNX op type → its operands that are matrices."""


def name_recurrent_weights(exported: Any, params: Collection[str]) -> None:
    """Let each matrix of a recurrent op that is computed from one parameter be that parameter, values reordered.

    A parameter that something else reads too is left as it is.

    Args:
        exported: an onnx-ir model whose initializers have the parameters' names; it is changed.
        params: their names.
    """
    import onnx_ir as ir

    from bitwright_onnx.simulate.session import compile_session

    graph = exported.graph
    for node in list(graph):
        for index in OPERANDS.get(node.op_type, ()):
            operand = node.inputs[index]
            if operand is None or operand.producer() is None:
                continue
            between, root = _source(operand, params)
            if root is None or any(user not in between for user, _ in root.uses()):
                continue
            session = compile_session(exported, [operand.name])
            (values,) = session.run([operand.name], {})
            name = str(root.name)
            del graph.initializers[name]
            root.name = f"{name}_by_gates"
            made = ir.Value(name=name, type=operand.type, shape=ir.Shape(values.shape))
            made.const_value = ir.tensor(np.ascontiguousarray(values), name=name)
            graph.register_initializer(made)
            operand.replace_all_uses_with(made)
            for dead in reversed([n for n in graph if n in between]):
                if not any(output.uses() for output in dead.outputs):
                    graph.remove(dead, safe=True)


def _source(value: Any, params: Collection[str]) -> tuple[set[Any], Any]:
    """The nodes that a value is computed by, and the one parameter that they start from; None if it isn't one."""
    nodes: set[Any] = set()
    roots: dict[str, Any] = {}
    stack = [value]
    while stack:
        current = stack.pop()
        producer = current.producer()
        if producer is not None:
            if producer not in nodes:
                nodes.add(producer)
                stack += [v for v in producer.inputs if v is not None]
        elif current.is_initializer():
            if current.name in params:
                roots[str(current.name)] = current
        else:
            return nodes, None
    return nodes, next(iter(roots.values())) if len(roots) == 1 else None
