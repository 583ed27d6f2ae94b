"""Small graphs that stand for something enormous: found before memory or time is spent on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf

from bitwright.errors import ModelError
from bitwright_tensorflow.graph.model import GraphDef, NodeDef
from bitwright_tensorflow.graph.sizes import refuse_computed

_BYTES, _TIMES = 2**26, 20
"""All constants of a graph may take so many bytes, or so many times its own: of equal values one is stored."""
_NODES, _TIMES_WRITTEN = 2_000, 100
"""So many nodes may a graph have with its functions written out, or so many times those that it states."""
_NESTED = 100


def refuse_bombs(graph_def: GraphDef, where: str) -> None:
    """Refuse a graph whose constants, given or computed, or whose functions written out, are far larger than it.

    Args:
        graph_def: of a file.
        where: the file, for the message.

    Raises:
        ModelError: it is one, or a function calls itself.
    """
    nodes = [*graph_def.node, *(n for f in graph_def.library.function for n in f.node_def)]
    stored = graph_def.ByteSize()
    if (claimed := sum(map(_constant_bytes, nodes))) > max(_BYTES, _TIMES * stored):
        raise ModelError(
            f"{where} isn't opened: the constants in its {stored / 2**20:,.1f} MiB are {claimed / 2**20:,.0f} MiB large"
        )
    refuse_computed(graph_def, where)
    if not graph_def.library.function:
        return
    functions = {f.signature.name: f for f in graph_def.library.function}
    total, written = _written_out(graph_def.node, functions, {}, 0, where), len(nodes)
    if total > (most := max(_NODES, _TIMES_WRITTEN * written)):
        raise ModelError(
            f"{where} isn't opened: with its functions written out the graph has {total:,} nodes; {most:,} are "
            f"possible for the {written:,} that it states"
        )


def _constant_bytes(node: NodeDef) -> int:
    if node.op != "Const" or "value" not in node.attr:
        return 0
    tensor = node.attr["value"].tensor
    if any(d.size < 0 for d in tensor.tensor_shape.dim):
        return 0  # TensorFlow refuses it
    try:
        width = max(tf.as_dtype(tensor.dtype).size or 16, 1)
    except (TypeError, KeyError):
        return 0
    return int(math.prod(d.size for d in tensor.tensor_shape.dim) * width)


def _written_out(
    nodes: Iterable[NodeDef], functions: Mapping[str, Any], sizes: dict[str, int | None], depth: int, where: str
) -> int:
    """Nodes, with those of the functions that they call, branches and loops included."""
    total = 0
    for node in nodes:
        total += 1
        for name in called(node):
            if name not in functions:
                continue
            if name not in sizes:
                sizes[name] = None
                body = functions[name].node_def
                inner = None if depth > _NESTED else _written_out(body, functions, sizes, depth + 1, where)
                sizes[name] = inner
            known = sizes[name]
            if known is None:
                raise ModelError(
                    f"{where} isn't opened: its function {name!r} calls itself, or functions are nested without end"
                )
            total += known
    return total


def called(node: NodeDef) -> list[str]:
    """Names of functions that a node calls: itself one, or by its attributes."""
    found = [node.op]
    for value in node.attr.values():
        if value.WhichOneof("value") == "func":
            found.append(value.func.name)
        elif value.WhichOneof("value") == "list":
            found += [f.name for f in value.list.func]
    return found
