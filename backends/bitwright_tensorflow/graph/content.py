"""What a graph computes beyond its parameters' values, as a fingerprint."""

from __future__ import annotations

import numpy as np

from bitwright.runs import fingerprint
from bitwright_tensorflow.graph.canonical import recognize
from bitwright_tensorflow.graph.model import NodeDef, TfModel

_TOLD_OF = ("_output_shapes", "_class")
"""Attributes that say something of a node and change nothing."""


def content(model: TfModel) -> str:
    """Hash of its nodes with their attributes, of the functions that they call, and of the variables and constants that
    no parameter shows."""
    shown = {read.source for read in recognize(model).params.values()}
    definition = model.graph_def
    nodes = [_node(node, without=node.name in shown) for node in definition.node]
    functions = sorted(
        (f.signature.name, [_node(node) for node in f.node_def], sorted(f.ret.items()))
        for f in definition.library.function
    )
    hidden = ((name, np.asarray(values)) for name, values in sorted(model.values.items()) if name not in shown)
    return fingerprint.of_json([nodes, functions, model.inputs, model.outputs, fingerprint.of_arrays(hidden)])


def _node(node: NodeDef, *, without: bool = False) -> list[object]:
    """A node; without its value, where it is a constant that a parameter shows."""
    attributes = {
        key: fingerprint.of_object(value.SerializeToString(deterministic=True))
        for key, value in node.attr.items()
        if key not in _TOLD_OF and not (without and key == "value")
    }
    return [node.name, node.op, list(node.input), attributes]
