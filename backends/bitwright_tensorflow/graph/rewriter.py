"""Rewriting a GraphDef node by node, with names that stay: what is replaced makes room for what takes its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import tensorflow as tf

from bitwright.graph import free_name
from bitwright_tensorflow.graph.model import Array, MetaGraphDef, NodeDef, node_of, operand_of, tensor_id


class Rewriter:
    """Nodes of a graph that the caller owns.

    Args:
        meta: changed in place by `finish`.
        protected: nodes that are never dropped.
    """

    def __init__(self, meta: MetaGraphDef, protected: Collection[str] = ()) -> None:
        self.meta = meta
        self.protected = set(protected)
        self.nodes: dict[str, NodeDef] = {}
        for node in meta.graph_def.node:
            copied = NodeDef()
            copied.CopyFrom(node)
            self.nodes[node.name] = copied
        self._users: dict[str, set[str]] = {name: set() for name in self.nodes}
        for node in self.nodes.values():
            for operand in node.input:
                self._users.setdefault(node_of(operand), set()).add(node.name)

    def finish(self) -> MetaGraphDef:
        """Write the nodes back."""
        del self.meta.graph_def.node[:]
        self.meta.graph_def.node.extend(self.nodes.values())
        return self.meta

    def free(self, wanted: str) -> str:
        """A name that no node has."""
        return free_name(wanted, self.nodes)

    def add(self, node: NodeDef) -> NodeDef:
        """Put in a node."""
        self.nodes[node.name] = node
        self._users.setdefault(node.name, set())
        for operand in node.input:
            self._users.setdefault(node_of(operand), set()).add(node.name)
        return node

    def put(self, node: NodeDef) -> None:
        """Put a node in the place of the one of its name."""
        for operand in self.nodes[node.name].input:
            self._users[node_of(operand)].discard(node.name)
        self.add(node)

    def readers_of(self, name: str) -> set[str]:
        """Nodes that read a node."""
        return set(self._users.get(name, ()))

    def rewire(self, name: str, index: int, tensor: str) -> None:
        """Let a data operand read another tensor."""
        node = self.nodes[name]
        old = node_of(node.input[index])
        node.input[index] = operand_of(tensor)
        if all(node_of(i) != old for i in node.input):
            self._users[old].discard(name)
        self._users.setdefault(node_of(tensor), set()).add(name)

    def move_aside(self, name: str, suffix: str, *, outputs: Iterable[int] = (0,)) -> str:
        """Rename a node so that another can take its name.

        Readers of `outputs`, and control dependencies, keep the name and so come to read the new node; readers of
        other outputs follow the renamed one.
        """
        node = self.nodes.pop(name)
        given = {f"{name}:{i}" for i in outputs}
        moved = self.free(f"{name}/{suffix}")
        node.name = moved
        self.nodes[moved] = node
        self._users[moved] = set()
        for operand in node.input:
            self._users[node_of(operand)].discard(name)
            self._users[node_of(operand)].add(moved)
        for user in list(self._users[name]):
            reader = self.nodes.get(user)
            if reader is None:
                self._users[name].discard(user)
                continue
            for index, operand in enumerate(reader.input):
                if operand.startswith("^") or node_of(operand) != name or tensor_id(operand) in given:
                    continue
                self.rewire(user, index, f"{moved}:{tensor_id(operand).rpartition(':')[2]}")
        return moved

    def collect(self, names: Iterable[str]) -> None:
        """Drop nodes that nothing reads any more, and then what only they have read."""
        stack = list(names)
        while stack:
            name = stack.pop()
            node = self.nodes.get(name)
            if node is None or name in self.protected or self._users.get(name):
                continue
            del self.nodes[name]
            for operand in node.input:
                source = node_of(operand)
                self._users[source].discard(name)
                stack.append(source)


def unary(op: str, name: str, tensor: str, dtype: str) -> NodeDef:
    """A node of one operand."""
    return elementwise(op, name, [tensor], dtype)


def elementwise(op: str, name: str, tensors: Iterable[str], dtype: str, **attributes: float) -> NodeDef:
    """A node whose operands and result have one type."""
    node = NodeDef(name=name, op=op, input=[operand_of(t) for t in tensors])
    node.attr["T"].type = tf.as_dtype(dtype).as_datatype_enum
    for key, value in attributes.items():
        node.attr[key].f = value
    return node


def bias_add(name: str, tensor: str, bias: str, dtype: str, data_format: str) -> NodeDef:
    """tensor + bias along channels."""
    node = NodeDef(name=name, op="BiasAdd", input=[operand_of(tensor), operand_of(bias)])
    node.attr["T"].type = tf.as_dtype(dtype).as_datatype_enum
    node.attr["data_format"].s = data_format.encode()
    return node


def product(name: str, tensor: str, matrix: str, dtype: str, *, batched: bool) -> NodeDef:
    """tensor · matrix along the last axis; `batched`: the tensor has more than two axes."""
    node = elementwise("BatchMatMulV2" if batched else "MatMul", name, [tensor, matrix], dtype)
    for attribute in ("adj_x", "adj_y") if batched else ("transpose_a", "transpose_b"):
        node.attr[attribute].b = False
    return node


def constant(name: str, array: Array, dtype: str) -> NodeDef:
    """A Const."""
    node = NodeDef(name=name, op="Const")
    kind = tf.as_dtype(dtype)
    node.attr["dtype"].type = kind.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.asarray(array), kind, array.shape))
    return node


def variable(name: str, array: Array, dtype: str) -> tuple[NodeDef, NodeDef]:
    """A resource variable and the node that reads it."""
    kind = tf.as_dtype(dtype).as_datatype_enum
    handle = NodeDef(name=name, op="VarHandleOp")
    handle.attr["dtype"].type = kind
    handle.attr["shape"].shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
    handle.attr["shared_name"].s = name.encode()
    handle.attr["container"].s = b""
    read = NodeDef(name=f"{name}/Read/ReadVariableOp", op="ReadVariableOp", input=[name])
    read.attr["dtype"].type = kind
    return handle, read


def declared_variable(name: str, array: Array, dtype: str) -> tuple[list[NodeDef], bytes, str]:
    """A variable of a v1 graph with its initializer; its VariableDef for the collections; the tensor that reads it."""
    with tf.Graph().as_default() as graph:
        made = tf.compat.v1.get_variable(
            name, initializer=tf.constant(array, tf.as_dtype(dtype)), use_resource=True, trainable=True
        )
        proto = made.to_proto()
        nodes = list(graph.as_graph_def().node)
        # tf.constant stands outside of the variable's scope; it must not meet a node of the user's.
        for node in nodes:
            inputs = [i if i.startswith(name) else f"{name}/{i}" for i in node.input]
            del node.input[:]
            node.input.extend(inputs)
            node.name = node.name if node.name.startswith(name) else f"{name}/{node.name}"
        if not proto.initial_value_name.startswith(name):
            proto.initial_value_name = f"{name}/{proto.initial_value_name}"
    return nodes, proto.SerializeToString(), proto.snapshot_name
