"""Which nodes of a captured graph carry data: activations, as against sizes, index tables and other constants."""

from __future__ import annotations

from torch import fx, nn

from bitwright_torch.model import tensor_of

_SIZES = frozenset({"sym_size", "sym_numel", "sym_stride", "size", "numel", "shape"})


def data_nodes(graph: fx.Graph, holder: nn.Module) -> frozenset[fx.Node]:
    """Nodes that depend on the model's inputs, or compute something from its trainable parameters.

    What is made of sizes and fixed buffers alone (positions, masks, anchor grids) carries no data.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        reads = any(n in found or _is_trainable(n, holder) for n in node.all_input_nodes)
        if node.op == "placeholder" or (node.op == "call_function" and reads and not _is_size(node)):
            found.add(node)
    return frozenset(found)


def _is_size(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").partition(".")[0]
    return name in _SIZES


def _is_trainable(node: fx.Node, holder: nn.Module) -> bool:
    if node.op != "get_attr" or str(node.target).rpartition(".")[2] == "training":
        return False
    return isinstance(tensor_of(holder, str(node.target)), nn.Parameter)
