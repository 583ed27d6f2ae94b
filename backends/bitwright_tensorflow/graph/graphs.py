"""GraphDefs as graphs: who reads what, what a tensor depends on, and cutting out the part between two cuts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import tensorflow as tf

from bitwright.backend import not_computable
from bitwright.errors import ModelError
from bitwright.graph import TensorId, free_name
from bitwright_tensorflow.graph.model import GraphDef, NodeDef, node_of, operand_of, tensor_id

Spec = tuple[tf.DType, tf.TensorShape]
PLACEHOLDERS = frozenset({"Placeholder", "PlaceholderWithDefault", "PlaceholderV2"})


def data_operands(node: NodeDef) -> list[str]:
    """Operands without control dependencies, as tensors ("a:0")."""
    return [tensor_id(i) for i in node.input if not i.startswith("^")]


class Wiring:
    """Nodes by name and readers by tensor, of one GraphDef as it is when asked."""

    def __init__(self, graph_def: GraphDef) -> None:
        self.nodes: dict[str, NodeDef] = {node.name: node for node in graph_def.node}
        self.readers: dict[TensorId, list[tuple[str, int]]] = defaultdict(list)
        for node in graph_def.node:
            for index, operand in enumerate(node.input):
                if not operand.startswith("^"):
                    self.readers[tensor_id(operand)].append((node.name, index))

    def node(self, name: str) -> NodeDef:
        """A node by name.

        Raises:
            ModelError: there is none.
        """
        try:
            return self.nodes[name]
        except KeyError:
            raise ModelError(f"the graph has no node {name!r}") from None

    def order(self, outputs: Sequence[TensorId], inputs: Collection[TensorId]) -> list[str]:
        """Names of the nodes between inputs and outputs, each behind what it reads; loops enter at their `Merge`."""
        done: dict[str, bool] = {}
        order: list[str] = []
        stack = [(node_of(t), False) for t in reversed(outputs) if t not in inputs]
        while stack:
            name, finished = stack.pop()
            if finished:
                done[name] = True
                order.append(name)
                continue
            if name in done:
                continue
            done[name] = False
            stack.append((name, True))
            node = self.node(name)
            for tensor in reversed(data_operands(node)):
                source = node_of(tensor)
                if tensor not in inputs and source not in done:
                    stack.append((source, False))
        return order


def extract(
    graph_def: GraphDef,
    feeds: Sequence[TensorId],
    fetches: Iterable[TensorId],
    spec: Callable[[TensorId], Spec],
    *,
    controlled: Collection[str] = (),
) -> tuple[GraphDef, Mapping[TensorId, TensorId]]:
    """The part of a graph that computes `fetches` from `feeds`.

    Control dependencies are kept for the nodes of `controlled` only (those inside of loops and conditions).

    Returns:
        The part, and the placeholder's tensor for each feed that it uses.

    Raises:
        ModelError: a needed placeholder is not among the feeds.
    """
    nodes = {node.name: node for node in graph_def.node}
    given, fetches = set(feeds), list(fetches)
    needed: dict[str, None] = {}
    used: set[TensorId] = set()
    stack = [t for t in fetches if t not in given]
    while stack:
        name = node_of(stack.pop())
        if name in needed:
            continue
        if name not in nodes:
            raise ModelError(f"the graph has no node {name!r}")
        node = nodes[name]
        if node.op == "Placeholder" and f"{name}:0" not in given:
            raise not_computable(fetches, feeds, [name])
        needed[name] = None
        for operand in node.input:
            if operand.startswith("^"):
                if name in controlled:
                    stack.append(operand[1:])
            elif (tensor := tensor_id(operand)) in given:
                used.add(tensor)
            else:
                stack.append(tensor)
    part = GraphDef()
    part.versions.CopyFrom(graph_def.versions)
    part.library.CopyFrom(graph_def.library)
    places: dict[TensorId, TensorId] = {}
    for tensor in feeds:
        if tensor not in used:
            continue
        name = node_of(tensor)
        if nodes[name].op in PLACEHOLDERS:
            kept = part.node.add()
            kept.CopyFrom(nodes[name])
            del kept.input[:]
            kept.op = "Placeholder"
            places[tensor] = tensor
            continue
        free = name if tensor == f"{name}:0" and name not in needed else free_name(f"{name}/fed", nodes)
        dtype, shape = spec(tensor)
        part.node.append(placeholder(free, dtype, shape))
        places[tensor] = f"{free}:0"
    for node in graph_def.node:
        if node.name not in needed:
            continue
        kept = part.node.add()
        kept.CopyFrom(node)
        kept.device = ""
        kept.attr.pop("_class", None)
        del kept.input[:]
        for operand in node.input:
            if operand.startswith("^"):
                if node.name in controlled and operand[1:] in needed:
                    kept.input.append(operand)
            else:
                kept.input.append(operand_of(places.get(tensor_id(operand), tensor_id(operand))))
    return part, places


def placeholder(name: str, dtype: tf.DType, shape: tf.TensorShape) -> NodeDef:
    """A node that is fed."""
    node = NodeDef(name=name, op="Placeholder")
    node.attr["dtype"].type = dtype.as_datatype_enum
    node.attr["shape"].shape.CopyFrom(shape.as_proto())
    return node
