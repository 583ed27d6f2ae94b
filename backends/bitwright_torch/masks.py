"""Which tensors of a graph are masks: they hold −∞, or a number that stands for it, and so have no integer grid."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from bitwright.graph import LINEAR_KINDS, OpKind
from bitwright_torch.naming import call_name
from bitwright_torch.operands import Operand
from bitwright_torch.optable import KINDS

MASK = "mask"
"""Type of such a tensor in the core's graph."""
_HUGE = 1e30
_FILLS = frozenset({"masked_fill", "where", "mul", "full", "scalar_tensor", "full_like"})
_CARRYING = frozenset(
    {OpKind.RESHAPE, OpKind.TRANSPOSE, OpKind.SLICE, OpKind.IDENTITY, OpKind.CONCAT, OpKind.ADD}
)  # fmt: skip


def masks(graph: fx.Graph, held: Mapping[fx.Node, Operand], model: nn.Module) -> set[fx.Node]:
    """Nodes that hold what a softmax is to leave out: masks, and the masked values themselves.

    A grid over −∞ doesn't exist, and one over the smallest float32 would have no step left for the rest.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in held:
            # Weights are the large ones, and no masks: they needn't be looked through.
            weighs = all(_kind(user) in LINEAR_KINDS for user in node.users)
            if not weighs and bool((held[node].view(model) <= -_HUGE).any()):
                found.add(node)
        elif node.op == "call_function":
            fills = call_name(node) in _FILLS and any(a <= -_HUGE for a in node.args if isinstance(a, int | float))
            if fills or (_carries(node) and not found.isdisjoint(node.all_input_nodes)):
                found.add(node)
    return found


def _carries(node: fx.Node) -> bool:
    """Whether what an op gives is a mask where one of its operands is."""
    return _kind(node) in _CARRYING or call_name(node) in ("where", "masked_fill", "baddbmm")


def _kind(node: fx.Node) -> OpKind | None:
    return KINDS[name][0] if node.op == "call_function" and (name := call_name(node)) in KINDS else None
