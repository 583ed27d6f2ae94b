"""Putting ops into a graph: variables, and chains of nodes on tensors and on the operands that read parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.variable_pb2 import VariableDef

from bitwright.graph import TensorId, free_name
from bitwright_tensorflow.graph.graphs import PLACEHOLDERS
from bitwright_tensorflow.graph.model import MetaGraphDef, NodeDef, node_of, operand_of, tensor_id
from bitwright_tensorflow.simulate.fake_quant import Node

GLOBAL, TRAINABLE = tf.compat.v1.GraphKeys.GLOBAL_VARIABLES, tf.compat.v1.GraphKeys.TRAINABLE_VARIABLES
Edge = tuple[str, int]


class Instrument:
    """Changes a copy of a graph; `finish` returns it.

    Chains are written as ordinary TensorFlow calls: `stand_in` gives a symbol for a tensor of the graph, and the nodes
    that calls on it have made are moved over at the end.

    Args:
        meta: a graph of one's own.
        order: names of the nodes between the model's inputs and outputs; only these read chains.
    """

    def __init__(self, meta: MetaGraphDef, order: Sequence[str]) -> None:
        self.meta = meta
        self._order = frozenset(order)
        self._nodes: dict[str, NodeDef] = {n.name: n for n in meta.graph_def.node}
        self._readers: dict[TensorId, list[Edge]] = {}
        for node in meta.graph_def.node:
            for index, operand in enumerate(node.input):
                if not operand.startswith("^"):
                    self._readers.setdefault(tensor_id(operand), []).append((node.name, index))
        self.scratch = tf.Graph()
        self._sources: dict[str, str] = {}
        self._symbols: dict[TensorId, Node] = {}
        self._rewired: list[tuple[Edge, Node]] = []
        self._renamed: dict[str, str] = {}

    def free(self, name: str) -> str:
        """A name scope that the graph doesn't have."""
        taken = {n for n in self._nodes if n.startswith(name)}
        taken |= {n[: len(name)] for n in taken if n[len(name) : len(name) + 1] == "/"}
        return free_name(name, taken)

    def stand_in(self, tensor: TensorId, dtype: Any, shape: Sequence[int | None] | None) -> Node:
        """The symbol of a tensor in the scratch graph."""
        if tensor not in self._symbols:
            with self.scratch.as_default(), tf.name_scope(""):
                name = f"stand_in_{len(self._sources)}"
                symbol = tf.compat.v1.placeholder(dtype, shape, name=name)
            self._sources[symbol.op.name] = tensor
            self._symbols[tensor] = symbol
        return self._symbols[tensor]

    # -- variables

    def variable(self, name: str, dtype: Any, shape: Sequence[int | None] | None, *, trainable: bool = False) -> Node:
        """A new resource variable; returns the symbol of its value.

        Its initializer does nothing, so that `global_variables_initializer` leaves its value.
        """
        handle = self._node(name, "VarHandleOp")
        handle.attr["shared_name"].s = name.encode()
        handle.attr["dtype"].type = tf.as_dtype(dtype).as_datatype_enum
        handle.attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())
        return self.collect(name, shape, trainable=trainable)

    def collect(self, handle: str, shape: Sequence[int | None] | None, *, trainable: bool) -> Node:
        """Enter a VarHandleOp in the collections of variables, with an initializer that does nothing."""
        dtype = self._nodes[handle].attr["dtype"].type
        read = self._node(self.free(f"{handle}/Read/ReadVariableOp"), "ReadVariableOp", handle)
        read.attr["dtype"].type = dtype
        initializer = self._node(self.free(f"{handle}/Assign"), "NoOp")
        record = VariableDef(
            variable_name=f"{handle}:0",
            initializer_name=initializer.name,
            snapshot_name=f"{read.name}:0",
            is_resource=True,
            trainable=trainable,
        )
        for key in (GLOBAL, TRAINABLE) if trainable else (GLOBAL,):
            self.meta.collection_def[key].bytes_list.value.append(record.SerializeToString())
        return self.stand_in(f"{read.name}:0", tf.as_dtype(dtype), shape)

    def variable_for(self, constant: str, shape: Sequence[int], *, trainable: bool) -> TensorId:
        """Turn a Const into a variable of the same name; everything that read it reads the variable.

        Returns:
            The tensor of its value.
        """
        node = self._nodes[constant]
        dtype = node.attr["dtype"].type
        node.op = "VarHandleOp"
        node.attr.clear()
        del node.input[:]
        node.attr["shared_name"].s = constant.encode()
        node.attr["dtype"].type = dtype
        node.attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())
        symbol = self.collect(constant, shape, trainable=trainable)
        read = self._sources[symbol.op.name]
        for edge in self._readers.pop(f"{constant}:0", []):
            name, index = edge
            self._nodes[name].input[index] = operand_of(read)
            self._readers.setdefault(read, []).append(edge)
        return read

    def _node(self, name: str, op: str, *inputs: str) -> NodeDef:
        node = self.meta.graph_def.node.add(name=name, op=op)
        node.input.extend(inputs)
        self._nodes[name] = node
        return node

    # -- rewiring

    def redirect(self, edge: Edge, symbol: Node) -> None:
        """Let one operand read a chain's end."""
        self._rewired.append((edge, symbol))

    def replace(self, tensor: TensorId, symbol: Node, *, name: str | None = None) -> TensorId:
        """Let the network's readers of a tensor read a chain's end.

        Args:
            tensor: what the chain begins with.
            symbol: the chain's end.
            name: where given, the chain's end takes over the tensor's name, and so all its readers, if it can: the
                producer has one output and isn't fed. It is then called by this name.

        Returns:
            The name of the chain's end.
        """
        producer = self._nodes[node_of(tensor)]
        sole = all(node_of(t) != producer.name or t == tensor for t in self._readers) and tensor.endswith(":0")
        if name is not None and sole and producer.op not in PLACEHOLDERS:
            self._renamed[producer.name] = name
            self._renamed[symbol.op.name] = producer.name
            return tensor
        for edge in self._readers.get(tensor, []):
            if edge[0] in self._order:
                self.redirect(edge, symbol)
        return f"{symbol.op.name}:0"

    def finish(self) -> MetaGraphDef:
        """The changed graph."""
        # A producer whose name is taken over has a new one; what its chain reads is the producer.
        moved = {old: new for old, new in self._renamed.items() if old in self._nodes}
        for (name, index), symbol in self._rewired:
            self._nodes[name].input[index] = self._operand(operand_of(symbol.name), moved)
        for old, new in moved.items():
            self._nodes[old].name = new
        for node in self.scratch.as_graph_def().node:
            if node.name not in self._sources:
                added = self.meta.graph_def.node.add()
                added.CopyFrom(node)
                added.name = self._renamed.get(node.name, node.name)
                for index, operand in enumerate(node.input):
                    added.input[index] = self._operand(operand, moved)
        return self.meta

    def _operand(self, operand: str, moved: dict[str, str]) -> str:
        """What an operand of the scratch graph is called in the graph."""
        name, _, output = operand.partition(":")
        if name in self._sources:
            name, _, output = self._sources[name].partition(":")
            name = moved.get(name, name)
        else:
            name = self._renamed.get(name, name)
        return name if output in ("", "0") else f"{name}:{output}"


def drop_unread(meta: MetaGraphDef, names: Collection[str], keep: Sequence[TensorId]) -> None:
    """Remove constants that nothing reads any more: every session would carry their values along."""
    graph_def = meta.graph_def
    read = {node_of(i) for node in graph_def.node for i in node.input} | {node_of(t) for t in keep}
    kept = [n for n in graph_def.node if n.op != "Const" or n.name not in names or n.name in read]
    if len(kept) < len(graph_def.node):
        parts = [NodeDef.FromString(n.SerializeToString()) for n in kept]
        del graph_def.node[:]
        graph_def.node.extend(parts)


def variable_records(meta: MetaGraphDef, key: str) -> dict[str, VariableDef]:
    """VariableDefs of a collection by variable node."""
    if key not in meta.collection_def:
        return {}
    found = (VariableDef.FromString(b) for b in meta.collection_def[key].bytes_list.value)
    return {node_of(record.variable_name): record for record in found}
