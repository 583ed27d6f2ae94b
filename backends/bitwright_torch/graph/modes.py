"""Ops that behave differently in training: the captured graph asks the module's own flag each time it runs.

A model is captured in evaluation mode, where a traced batch norm or dropout would be fixed to inference for good.
Each is replaced by one of these functions, whose `training` argument is a `get_attr` of the module's flag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

aten = torch.ops.aten


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """As `nn.BatchNorm2d`: batch statistics and running averages in training, the averages otherwise.

    Args:
        x: (samples, channels, …).
        weight, bias, mean, var: (channels,).
        batches: number of batches seen, counted up in training.
        training: the module's flag.
        momentum: of the running averages; None averages over all batches.
        eps: added to the variance.
    """
    factor = 0.0 if momentum is None else momentum
    if training and batches is not None:
        batches.add_(1)
        if momentum is None:
            factor = 1.0 / float(batches)
    return F.batch_norm(x, mean, var, weight, bias, training or mean is None, factor, eps)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`."""
    return F.dropout(x, p, training)


def feature_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Drops whole channels, as `nn.Dropout2d`."""
    result: Tensor = torch.feature_dropout(x, p, training)
    return result


def alpha_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.alpha_dropout`."""
    return F.alpha_dropout(x, p, training)


_DROPOUTS: dict[Any, Callable[[Tensor, float, bool], Tensor]] = {
    aten.dropout.default: dropout,
    aten.feature_dropout.default: feature_dropout,
    aten.alpha_dropout.default: alpha_dropout,
}


def bind_modes(graph: fx.Graph, holder: nn.Module, owner: Callable[[fx.Node], str]) -> None:
    """Let batch norms and dropouts of a graph follow the flags of the modules that own them.

    Args:
        graph: changed in place; parameters are `get_attr` nodes already.
        holder: the module tree.
        owner: dotted name of the module that a node was called in.
    """
    for node in list(graph.nodes):
        if node.target in _DROPOUTS:
            flag = _flag(graph, node, owner(node), holder)
            _replace(graph, node, _DROPOUTS[node.target], (node.args[0], node.args[1], flag))
        elif node.target is aten.batch_norm.default:
            x, weight, bias, mean, var, training, momentum, eps = node.args[:8]
            if training or not (mean is None or mean.op == "get_attr"):
                continue  # captured in evaluation: what says training here does so in both modes
            name = str(mean.target).rpartition(".")[0] if isinstance(mean, fx.Node) else owner(node)
            module = holder.get_submodule(name)
            counter = getattr(module, "num_batches_tracked", None)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                momentum = module.momentum
            with graph.inserting_before(node):
                path = f"{name}.num_batches_tracked" if name else "num_batches_tracked"
                batches = graph.get_attr(path) if isinstance(counter, Tensor) else None
            flag = _flag(graph, node, name, holder)
            _replace(graph, node, batch_norm, (x, weight, bias, mean, var, batches, flag, momentum, eps))


def _flag(graph: fx.Graph, node: fx.Node, name: str, holder: nn.Module) -> fx.Node:
    try:
        holder.get_submodule(name)
    except AttributeError:
        name = ""
    with graph.inserting_before(node):
        return graph.create_node("get_attr", f"{name}.training" if name else "training")


def _replace(graph: fx.Graph, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def is_flag_name(name: str) -> bool:
    """Whether a dotted name is a module's training flag."""
    return name.rpartition(".")[2] == "training"


def is_flag(node: fx.Node) -> bool:
    """Whether a node reads a module's training flag."""
    return node.op == "get_attr" and is_flag_name(str(node.target))
