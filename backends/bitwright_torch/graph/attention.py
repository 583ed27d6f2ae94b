"""Fused attention, spelled out so that its inner tensors can be tapped and quantized.

`scaled_dot_product_attention` becomes query · scale (Mul), keyᵀ (Transpose), scores (MatMul), weights (Softmax) and
their product with the values (MatMul), Vaswani et al. 2017, eq. 1. The mask is applied inside the softmax: its −∞ is
no value of any quantized tensor. The last op keeps the fused op's id and output, so nothing else is renamed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from bitwright_torch.graph.model import NAMES, info

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def attention_softmax(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax over keys of masked scores.

    Args:
        scores: (…, queries, keys).
        mask: broadcastable to it; boolean (True takes part) or added. The weights of a query that may see no key are
            zero, as PyTorch has it.
        causal: a query sees only the keys up to its own position.
    """
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return torch.softmax(scores, -1)
    seen = mask if mask.dtype == torch.bool else mask != -math.inf
    if mask.dtype != torch.bool:
        scores = scores + mask
    weights = torch.softmax(torch.where(seen, scores, torch.finfo(scores.dtype).min), -1)
    return weights if causal else torch.where(seen.any(-1, keepdim=True), weights, 0.0)


def scale_query(query: Tensor, scale: float | None) -> Tensor:
    """query · scale, 1/√width by default."""
    return query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)


def repeat_heads(x: Tensor, like: Tensor) -> Tensor:
    """Key or value heads repeated to the number of query heads (grouped-query attention)."""
    return x.repeat_interleave(like.shape[-3] // x.shape[-3], -3)


def lower_attention(graph: fx.Graph) -> fx.Graph:
    """A copy with fused attention spelled out; the graph itself where there is none.

    Attention that drops out weights in evaluation too stays as it is.
    """
    if not any(_is_plain(node) for node in graph.nodes):
        return graph
    lowered = fx.Graph()
    values: dict[fx.Node, Any] = {}
    lowered.output(lowered.graph_copy(graph, values))
    lowered.output_node().meta = dict(graph.output_node().meta)
    for node in list(lowered.nodes):
        if _is_plain(node):
            _lower(lowered, node)
    return lowered


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _is_plain(node: fx.Node) -> bool:
    return node.target is SDPA and not _arguments(node).get("dropout_p")


def _lower(graph: fx.Graph, node: fx.Node) -> None:
    given, about = _arguments(node), info(node)
    query, key, value = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask")

    def call(part: str, target: Any, args: tuple[Any, ...], sizes: tuple[str, ...]) -> fx.Node:
        new = graph.call_function(target, args)
        name = f"{about.op}.{part}" if part else about.op
        shape = tuple(int(n) if n.isdigit() else None for n in sizes)
        new.meta[NAMES] = replace(about, op=name, tensor=f"{name}.output", sizes=sizes, shape=shape)
        return new

    q, k, v = (info(n).sizes for n in (query, key, value))
    with graph.inserting_before(node):
        if given.get("enable_gqa") and q[-3] != k[-3]:
            k, v = (*k[:-3], q[-3], *k[-2:]), (*v[:-3], q[-3], *v[-2:])
            key = call("key_heads", repeat_heads, (key, query), k)
            value = call("value_heads", repeat_heads, (value, query), v)
        query = call("query", scale_query, (query, given.get("scale")), q)
        key = call("key", aten.transpose.int, (key, -2, -1), (*k[:-2], k[-1], k[-2]))
        scores = call("scores", aten.matmul.default, (query, key), (*q[:-1], k[-2]))
        weights = call("weights", attention_softmax, (scores, mask, bool(given.get("is_causal"))), (*q[:-1], k[-2]))
        result = call("", aten.matmul.default, (weights, value), about.sizes)
    result.meta[NAMES] = about
    node.replace_all_uses_with(result)
    graph.erase_node(node)
