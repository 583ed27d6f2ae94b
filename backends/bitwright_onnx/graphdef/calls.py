"""Calls of functions in a frozen graph, replaced by the functions' bodies.

Keras wraps what TensorFlow's CPU kernels lack (grouped convolutions) into a function that XLA compiles.
"""

from __future__ import annotations

from typing import Any

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_NAMED_OUTPUTS = ("FusedBatchNorm", "TopK", "Unique", "Switch", "Merge", "While", "StatelessWhile")
"""Ops with several outputs by name, which the order of outputs in a graph doesn't follow from."""
DEEPEST = 32
"""Levels of functions that call functions."""


def inline_calls(graph_def: Any) -> Any:
    """The graph with each call of one result replaced: its tensor keeps the call's name, inner nodes begin with it.

    What can't be replaced stays, to be named as an op that ONNX doesn't have. The graph given isn't changed.
    """
    for _ in range(DEEPEST):
        functions = {f.signature.name: f for f in graph_def.library.function}
        calls = {n.name for n in graph_def.node if n.op in CALLS and _replaceable(n, functions)}
        if not calls:
            return graph_def
        made = type(graph_def)()
        made.CopyFrom(graph_def)
        del made.node[:]
        for node in graph_def.node:
            if node.name in calls:
                _replace(made, node, functions[node.attr["f"].func.name])
            else:
                made.node.add().CopyFrom(node)
        graph_def = made
    return graph_def


def _replaceable(call: Any, functions: Any) -> bool:
    function = functions.get(call.attr["f"].func.name)
    if function is None or len(function.signature.output_arg) != 1:
        return False
    given = [i for i in call.input if not i.startswith("^")]
    lists = any(a.number_attr or a.type_list_attr for a in function.signature.input_arg)
    return (
        len(given) == len(function.signature.input_arg)
        and not lists
        and not any(n.op.startswith(_NAMED_OUTPUTS) for n in function.node_def)
    )


def _replace(graph_def: Any, call: Any, function: Any) -> None:
    given = [i for i in call.input if not i.startswith("^")]
    arguments: dict[str, str] = dict(zip((a.name for a in function.signature.input_arg), given, strict=True))

    def operand(text: str) -> str:
        """ "arg" or "node:output:index", as function bodies write it, in the graph's own terms."""
        if text.startswith("^"):
            return f"^{call.name}/{text[1:]}"
        name, _, rest = text.partition(":")
        if name in arguments:
            return arguments[name]
        index = rest.rpartition(":")[2] or "0"
        return f"{call.name}/{name}:{index}" if index != "0" else f"{call.name}/{name}"

    for inner in function.node_def:
        node = graph_def.node.add()
        node.CopyFrom(inner)
        node.name = f"{call.name}/{inner.name}"
        node.input[:] = [operand(i) for i in inner.input]
    end = graph_def.node.add(name=call.name, op="Identity")
    end.input.append(operand(function.ret[function.signature.output_arg[0].name]))
    end.attr["T"].type = function.signature.output_arg[0].type
    if "_output_shapes" in call.attr:
        end.attr["_output_shapes"].CopyFrom(call.attr["_output_shapes"])
