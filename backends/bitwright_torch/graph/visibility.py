"""Which nodes of a captured graph carry data: activations, as against sizes, index tables and other constants."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from bitwright_torch.graph.model import tensor_of

_FORM = {"type_as": 1}
"""Argument that is read for its form, by the op's name."""
_SIZES = frozenset({"sym_size", "sym_numel", "sym_stride", "size", "numel", "shape"})


def data_nodes(graph: fx.Graph, holder: nn.Module) -> frozenset[fx.Node]:
    """Nodes that depend on the model's inputs, or compute something from its trainable parameters.

    What is made of sizes, dtypes and fixed buffers alone (positions, masks, anchor grids) carries no data, unless it
    is a result of the model that an input gives its form.
    """
    found = _reached(graph, holder, value_operands)
    loose = _reached(graph, holder, lambda n: n.all_input_nodes)
    stack: list[fx.Node] = []
    fx.node.map_arg(graph.output_node().args, stack.append)
    while stack:
        node = stack.pop()
        if node in loose and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return frozenset(found)


def value_operands(node: fx.Node) -> list[fx.Node]:
    """Operands whose numbers a node reads: not those that give a dtype or device alone (`type_as`)."""
    name = getattr(node.target, "__name__", "").partition(".")[0] if node.op == "call_function" else ""
    if name not in _FORM:
        return node.all_input_nodes
    return [n for i, n in enumerate(node.args) if i != _FORM[name] and isinstance(n, fx.Node)]


def _reached(graph: fx.Graph, holder: nn.Module, operands: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        reads = any(n in found or _is_trainable(n, holder) for n in operands(node))
        if node.op == "placeholder" or (node.op == "call_function" and reads and not _is_size(node)):
            found.add(node)
    return found


def _is_size(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").partition(".")[0]
    return name in _SIZES


def _is_trainable(node: fx.Node, holder: nn.Module) -> bool:
    if node.op != "get_attr" or str(node.target).rpartition(".")[2] == "training":
        return False
    return isinstance(tensor_of(holder, str(node.target)), nn.Parameter)
