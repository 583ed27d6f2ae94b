"""Which tensors of a graph are masks: they hold −∞, or a number that stands for it, and so have no integer grid."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from bitwright.graph import OpKind
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
            if not bool((held[node].view(model) > -_HUGE).all()):
                found.add(node)
        elif node.op == "call_function":
            name = call_name(node)
            numbers = [a for a in node.args if isinstance(a, int | float)]
            fills = name in _FILLS and not all(a > -_HUGE for a in numbers)
            kind = KINDS.get(name, (None, ""))[0]
            carries = kind in _CARRYING or name in ("where", "masked_fill", "baddbmm")
            if fills or (carries and not found.isdisjoint(node.all_input_nodes)):
                found.add(node)
    return found
