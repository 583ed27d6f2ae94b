"""Concrete functions as one flat graph: calls inlined, captured variables as variables under their own names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from bitwright.errors import ModelError
from bitwright.graph import TensorId, free_name
from bitwright_tensorflow.capture.assignments import look_at_assignments
from bitwright_tensorflow.graph.graphs import Wiring
from bitwright_tensorflow.graph.model import Array, GraphDef, MetaGraphDef, NodeDef, node_of, operand_of, tensor_id
from bitwright_tensorflow.graph.rewriter import constant

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_COMPILED = "_XlaMustCompile"
_WRAPPING = re.compile(r"^(?:(?:Stateful)?PartitionedCall(?:_\d+)?/)+")
_END = re.compile(r"^Func/|(?:^|/)IdentityN?(?:_\d+)?$")


def inline_calls(graph_def: GraphDef, fetches: Sequence[TensorId]) -> GraphDef:
    """The graph with function calls replaced by the functions' bodies; tensors keep their names.

    Args:
        fetches: tensors that must stay, inputs too.
    """
    from tensorflow.core.protobuf import meta_graph_pb2
    from tensorflow.python.grappler import tf_optimizer

    meta = MetaGraphDef()
    meta.graph_def.CopyFrom(graph_def)
    for node in [*meta.graph_def.node, *(n for f in meta.graph_def.library.function for n in f.node_def)]:
        # Grappler would take loops and conditions apart into frames that cutting the graph can't hold together.
        node.attr.pop("_lower_using_switch_merge", None)
        node.attr.pop(_COMPILED, None)
    for function in meta.graph_def.library.function:
        # Another implementation of the same interface would be picked by device.
        function.attr.pop("api_implements", None)
        # Nor are functions taken apart that are compiled as a whole, as Keras's grouped convolutions are.
        if function.attr.pop(_COMPILED, None) is not None:
            function.attr.pop("_noinline", None)
    _keep_apart(meta.graph_def)
    kept = meta_graph_pb2.CollectionDef()
    kept.node_list.value.extend(dict.fromkeys(fetches))
    meta.collection_def["train_op"].CopyFrom(kept)
    config = tf.compat.v1.ConfigProto()
    options = config.graph_options.rewrite_options
    options.min_graph_nodes = -1
    options.optimizers.append("function")
    inlined: GraphDef = tf_optimizer.OptimizeGraph(config, meta)
    return inlined


def _keep_apart(graph_def: GraphDef) -> None:
    """Rename what functions hold where it would get the name of a node beside the call, as "cond/Identity" of a
    condition that became a call: grappler ends the process over two nodes of one name."""
    functions = {function.signature.name: function for function in graph_def.library.function}
    for nodes in (graph_def.node, *(function.node_def for function in functions.values())):
        calls = {node.name: node.attr["f"].func.name for node in nodes if node.op in CALLS}
        beside: dict[str, set[str]] = {}
        for name in [node.name for node in nodes] if calls else []:
            ends = [at for at, character in enumerate(name) if character == "/"]
            for called in [name[:at] for at in ends if name[:at] in calls]:
                inner = name[len(called) + 1 :].split("/")
                taken = beside.setdefault(calls[called], set())
                taken.update("/".join(inner[:count]) for count in range(1, len(inner) + 1))
        for called, taken in beside.items():
            if called in functions:
                _rename(functions[called], taken)


def _rename(function: Any, taken: set[str]) -> None:
    """Give a function's nodes other names than some."""
    free = taken | {node.name for node in function.node_def} | {arg.name for arg in function.signature.input_arg}
    names: dict[str, str] = {}
    for node in function.node_def:
        if node.name in taken:
            names[node.name] = free_name(node.name, free)
            free.add(names[node.name])

    def renamed(operand: str) -> str:
        mark = "^" if operand.startswith("^") else ""
        name, colon, rest = operand[len(mark) :].partition(":")
        return f"{mark}{names.get(name, name)}{colon}{rest}"

    for node in function.node_def:
        node.name = names.get(node.name, node.name)
        operands = [renamed(operand) for operand in node.input]
        del node.input[:]
        node.input.extend(operands)
    for ends in (function.ret, function.control_ret):
        for key in ends:
            ends[key] = renamed(ends[key])


def flatten(
    function: Any, inputs: Mapping[str, TensorId], outputs: Mapping[str, TensorId]
) -> tuple[GraphDef, dict[str, Array], dict[str, TensorId], dict[str, TensorId]]:
    """A concrete function's graph, its variables' values, and where its inputs and outputs now are.

    Raises:
        ModelError: it captures something that is not a variable (a lookup table, an iterator).
    """
    # Static shapes that Python knew: inference alone loses some behind `tf.tensordot`.
    graph_def = function.graph.as_graph_def(add_shapes=True)
    fetches = [*inputs.values(), *outputs.values(), *(inner.name for _, inner in function.graph.captures)]
    if any(node.op in CALLS for node in graph_def.node):
        graph_def = inline_calls(graph_def, fetches)
    nodes = {node.name: node for node in graph_def.node}
    replaced, values = _captured(function, nodes)
    look_at_assignments(
        nodes, list(inputs.values()), list(outputs.values()), {p: v.name for p, v in replaced.items()}, whole=True
    )
    part = _Flat(nodes, replaced, set(inputs.values()))
    ends = {name: part.origin(tensor) for name, tensor in outputs.items()}
    if len(set(ends.values())) < len(ends) or set(ends.values()) & set(inputs.values()):
        ends = dict(outputs)
    flat, names = part.build(list(ends.values()), list(inputs.values()))
    flat.versions.CopyFrom(graph_def.versions)
    flat.library.CopyFrom(graph_def.library)
    present = {node.name for node in flat.node}
    kept = {names.get(name, name): value for name, value in values.items() if names.get(name, name) in present}

    def renamed(tensor: TensorId) -> TensorId:
        name, _, index = tensor.partition(":")
        return f"{names.get(name, name)}:{index}"

    return flat, kept, {k: renamed(t) for k, t in inputs.items()}, {k: renamed(t) for k, t in ends.items()}


def _captured(function: Any, nodes: Mapping[str, NodeDef]) -> tuple[dict[str, NodeDef], dict[str, Array]]:
    """What stands in for each captured placeholder: a variable's handle, or a constant."""
    variables = {id(v.handle): v for v in _variables(function)}
    replaced: dict[str, NodeDef] = {}
    values: dict[str, Array] = {}
    by_handle: dict[int, str] = {}
    taken = set(nodes)
    for outer, inner in function.graph.captures:
        place = node_of(inner.name)
        if place not in nodes:
            continue
        if outer.dtype != tf.resource:
            try:
                replaced[place] = constant(place, outer.numpy(), outer.dtype.name)
            except (AttributeError, TypeError, NotImplementedError) as error:
                raise ModelError(f"the function captures {place!r}, a {outer.dtype.name} that can't be read") from error
            continue
        variable = variables.get(id(outer))
        if variable is None:
            raise ModelError(
                f"the function reads the resource {place!r}, which is not a variable (a lookup table or an iterator); "
                "leave it out of the function"
            )
        if id(outer) not in by_handle:
            name = free_name(variable.name.partition(":")[0], taken)
            taken.add(name)
            by_handle[id(outer)] = name
            values[name] = variable.numpy()
        name = by_handle[id(outer)]
        node = NodeDef(name=name, op="VarHandleOp")
        node.attr["dtype"].type = variable.dtype.as_datatype_enum
        node.attr["shape"].shape.CopyFrom(variable.shape.as_proto())
        node.attr["shared_name"].s = name.encode()
        node.attr["container"].s = b""
        replaced[place] = node
    return replaced, values


def _variables(function: Any) -> list[Any]:
    found = [*function.graph.variables, *getattr(function, "variables", ())]
    return [v for v in found if hasattr(v, "handle")]


class _Flat:
    """Cleaning up after inlining: captured placeholders replaced, Identities of calls gone, their prefixes too."""

    def __init__(self, nodes: Mapping[str, NodeDef], replaced: Mapping[str, NodeDef], fed: set[TensorId]) -> None:
        self._nodes, self._replaced, self._fed = nodes, replaced, fed

    def origin(self, tensor: TensorId) -> TensorId:
        """The tensor behind the Identities that functions put at their ends; those that users named stay."""
        while tensor not in self._fed and self._is_end(self._nodes[node_of(tensor)]):
            tensor = tensor_id(self._nodes[node_of(tensor)].input[int(tensor.rpartition(":")[2])])
        return tensor

    def _is_end(self, node: NodeDef) -> bool:
        return node.op in ("Identity", "IdentityN") and _END.search(node.name) is not None

    def _through(self, operand: str) -> str:
        """An operand, the Identities looked through that inlining has put around calls."""
        tensor = tensor_id(operand)
        while node_of(tensor).startswith("Func/") and self._nodes[node_of(tensor)].op == "Identity":
            tensor = tensor_id(self._nodes[node_of(tensor)].input[0])
        stand_in = self._replaced.get(node_of(tensor))
        return tensor if stand_in is None else f"{stand_in.name}:0"

    def build(self, outputs: Sequence[TensorId], inputs: Sequence[TensorId]) -> tuple[GraphDef, dict[str, str]]:
        """What outputs need, and every input; with the new names of nodes."""
        whole = GraphDef()
        added: set[str] = set()
        for node in self._nodes.values():
            kept = self._replaced.get(node.name, node)
            if kept.name in added:
                continue
            added.add(kept.name)
            copied = whole.node.add()
            copied.CopyFrom(kept)
            copied.device = ""
            for key in ("_class", "_user_specified_name"):
                copied.attr.pop(key, None)
            del copied.input[:]
            for operand in kept.input:
                copied.input.append(operand if operand.startswith("^") else operand_of(self._through(operand)))
        needed = set(_needed(whole, outputs)) | {node_of(t) for t in inputs}
        nodes = [node for node in whole.node if node.name in needed]
        names = _short_names([node.name for node in nodes])
        flat = GraphDef()
        for node in nodes:
            copied = flat.node.add()
            copied.CopyFrom(node)
            copied.name = names[node.name]
            del copied.input[:]
            for operand in node.input:
                source = node_of(operand)
                if operand.startswith("^"):
                    if source in needed:
                        copied.input.append(f"^{names[source]}")
                else:
                    copied.input.append(operand_of(f"{names[source]}:{tensor_id(operand).rpartition(':')[2]}"))
        return flat, names


def _needed(graph_def: GraphDef, outputs: Sequence[TensorId]) -> list[str]:
    """Data ancestors; control dependencies count inside of loops and conditions."""
    from bitwright_tensorflow.graph.frames import regions

    wiring = Wiring(graph_def)
    order = wiring.order(outputs, ())
    extra = [
        operand[1:]
        for region in regions(wiring, order)
        for name in region
        for operand in wiring.nodes[name].input
        if operand.startswith("^")
    ]
    return wiring.order([*outputs, *(f"{name}:0" for name in extra)], ()) if extra else order


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the calls that they were inlined from, where that leaves them distinct."""
    short = {name: _WRAPPING.sub("", name) for name in names}
    counts: dict[str, int] = {}
    for name in short.values():
        counts[name] = counts.get(name, 0) + 1
    taken = set(names)
    return {
        name: new if new == name or (counts[new] == 1 and new not in taken) else name for name, new in short.items()
    }
