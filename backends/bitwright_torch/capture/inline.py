"""Regions under `torch.no_grad()` or a disabled autocast, which export wraps in a call, put back in line."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bitwright.errors import ModelError
from bitwright_torch.graph.naming import source_of

aten = torch.ops.aten
_CHECKS = frozenset({"_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range",
                     "sym_constrain_range_for_size", "_functional_assert_async"})  # fmt: skip


def inline_regions(module: fx.GraphModule) -> None:
    """Replace wrapped regions by their ops, and drop run-time checks, in place.

    Raises:
        ModelError: control flow that depends on data, or an enabled autocast region.
    """
    graph = module.graph
    while (call := _next_region(module)) is not None:
        _inline(module, call)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            name = str(node.target._schema.name).partition("::")[2]
            if name in _CHECKS and not node.users:
                graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _next_region(module: fx.GraphModule) -> fx.Node | None:
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            return node  # type: ignore[no-any-return]
    return None


def _inline(module: fx.GraphModule, call: fx.Node) -> None:
    name = getattr(call.target, "__name__", str(call.target))
    detached = False
    if name == "wrap_with_set_grad_enabled":
        enabled, body, *operands = call.args
        detached = not enabled
    elif name == "wrap_with_autocast":
        _, _, enabled, _, body, *operands = call.args
        if enabled:
            raise ModelError(
                f"a region under torch.autocast can't be captured ({source_of(call)}); take autocast out of the "
                "model and put it around its call"
            )
    else:
        raise ModelError(
            f"the model's control flow depends on its data ({name}, at {source_of(call)}); write it with "
            "torch.where, or leave that module in Python: modules=[names of the parts to quantize]"
        )
    assert isinstance(body, fx.Node)
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    graph = module.graph
    values: dict[fx.Node, Any] = {}
    fed = iter(operands)
    with graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(fed)
            elif node.op == "get_attr":
                copied = graph.get_attr(f"{body.target}.{node.target}")
                copied.meta = dict(node.meta)
                values[node] = copied
            elif node.op != "output":
                values[node] = graph.node_copy(node, lambda n: values[n])
        results: Any = fx.node.map_arg(inner.graph.output_node().args[0], lambda n: values[n])
        if detached:
            results = fx.node.map_arg(results, lambda n: _detach(graph, n))
    for user in list(call.users):
        if user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem":
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(results[0] if isinstance(results, list | tuple) else results)
    graph.erase_node(call)


def _detach(graph: fx.Graph, node: fx.Node) -> fx.Node:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return node
    new = graph.call_function(aten.detach.default, (node,))
    new.meta = dict(node.meta)
    return new
