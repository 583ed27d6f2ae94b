"""What a captured graph computes from parameters, buffers and literals alone: it gives the same for every input."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright_torch.graph.model import NAMES, compile_graph, info
from bitwright_torch.graph.modes import is_flag
from bitwright_torch.graph.naming import call_name

_FLOAT = frozenset({"float32", "float16", "bfloat16", "float64"})


def constant_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes that depend on no input, size of an input, mode or chance, and aren't results of the model themselves."""
    results: list[fx.Node] = []
    fx.node.map_arg(graph.output_node().args, results.append)
    written = {n.args[0] for n in graph.nodes if n.target is torch.ops.aten.copy_.default}
    found: set[fx.Node] = set()
    ends = set(results)
    for node in graph.nodes:
        if node.op == "get_attr":
            if not is_flag(node) and node not in written:
                found.add(node)
        elif (
            node.op == "call_function"
            and node not in ends
            and (filling(node) is not None or all(n in found for n in node.all_input_nodes))
            and _is_pure(node)
            and _has_fixed_shape(node)
        ):
            found.add(node)
    return frozenset(found)


def filling(node: fx.Node) -> float | None:
    """The number of a tensor that is like another in form alone (`zeros_like`, `new_full`); None for any other."""
    name = call_name(node) if node.op == "call_function" else ""
    if name in ("zeros_like", "new_zeros"):
        return 0
    if name in ("ones_like", "new_ones"):
        return 1
    if name in ("full_like", "new_full"):
        value = node.args[1 if name == "full_like" else 2]
        return value if isinstance(value, int | float) else None
    return None


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable
    return target is operator.getitem


def _has_fixed_shape(node: fx.Node) -> bool:
    if NAMES not in node.meta:
        return False
    shape = info(node).shape
    return shape is None or all(n is not None for n in shape)


def computed(graph: fx.Graph, constants: frozenset[fx.Node]) -> Mapping[fx.Node, Evaluator]:
    """Constant float tensors that something else reads, but for the model's own tensors → what computes them."""
    return {
        node: Evaluator(graph, node)
        for node in constants
        if node.op == "call_function"
        and info(node).dtype in _FLOAT
        and info(node).shape is not None
        and any(user not in constants for user in node.users)
    }


class Evaluator:
    """Computes a constant node's value from the model's tensors, as they are at the call; differentiable.

    Args:
        graph: the captured graph; what the node needs is copied, so it may change afterwards.
        node: a constant node.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        needed: set[fx.Node] = set()
        stack = [node]
        while stack:
            if (found := stack.pop()) not in needed:
                needed.add(found)
                stack.extend(() if filling(found) is not None else found.all_input_nodes)
        named = (v for n in needed for v in (*n.args, *n.kwargs.values()) if isinstance(v, torch.device))
        device = next(named, torch.device("cpu"))
        part = fx.Graph()
        values: dict[fx.Node, Any] = {}
        for each in graph.nodes:
            if each in needed and (number := filling(each)) is not None:
                about = info(each)
                made = {"dtype": getattr(torch, about.dtype), "device": device}
                values[each] = part.call_function(torch.ops.aten.full.default, (list(about.shape or ()), number), made)
            elif each in needed:
                values[each] = part.node_copy(each, lambda n: values[n])
        part.output(values[node])
        self._part = part
        self._function: FunctionType | Callable[[nn.Module], Tensor] | None = None
        self.reads = tuple(str(n.target) for n in part.nodes if n.op == "get_attr")
        """Names of the model's tensors that it is computed from."""

    def __call__(self, model: nn.Module) -> Tensor:
        """The value."""
        if self._function is None:
            self._function = compile_graph(self._part)
        value = self._function(model)
        assert isinstance(value, Tensor)
        return value
