"""Blocks of a network, for techniques that learn one after another: between places where a single tensor passes.

A residual block, a decoder layer: everything that lies between two tensors through which all of the flow goes. What
depends on no layer (masks, rotary angles) may pass beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from bitwright.graph import LINEAR_KINDS, Graph, Op, OpId, OpKind, TensorId
from bitwright.technique import Span


@dataclass
class _Piece:
    """Ops up to the next narrow place.

    Attributes:
        ops: in topological order.
        joins: it ends with a sum of two tensors of the flow, as a residual block does.
    """

    ops: list[Op] = field(default_factory=list)
    joins: bool = False


def network_blocks(graph: Graph, chosen: Collection[OpId], *, additions: int, layers: int) -> list[Span]:
    """Spans that have all the chosen linear ops between them.

    Args:
        graph: of the network.
        chosen: the ops to be learned.
        additions: residual sums that a block has at most (a decoder layer of a transformer has two).
        layers: chosen ops that end a block, where it has fewer sums.

    Returns:
        Blocks in order, those without chosen ops left out. Where nothing is narrow, one block has more layers.
    """
    spans: list[Span] = []
    ops: list[Op] = []
    joins = 0
    pieces = _pieces(graph)
    for i, piece in enumerate(pieces):
        ops += piece.ops
        joins += piece.joins
        count = sum(op.id in chosen for op in ops)
        # A piece without layers belongs to what is before it; nothing is learned behind the last one.
        ahead = pieces[i + 1] if i + 1 < len(pieces) else None
        full = joins >= additions or count >= layers
        if ahead is not None and (not full or not any(op.kind in LINEAR_KINDS for op in ahead.ops)):
            continue
        if count:
            spans.append(_span(graph, ops, chosen))
        ops, joins = [], 0
    return spans


def _pieces(graph: Graph) -> list[_Piece]:
    flow = _flow(graph)
    left = {t: len(graph.consumers(t)) for t in graph.tensors}
    live: set[TensorId] = set()
    pieces = [_Piece()]
    for op in graph.ops:
        pieces[-1].ops.append(op)
        main = [t for t in dict.fromkeys(op.data_inputs) if t in flow]
        for t in main:
            left[t] -= 1
            if not left[t]:
                live.discard(t)
        live |= {t for t in op.outputs if t in flow and left[t]}
        if len(live) == 1:
            # Sums inside of a block, such as those of rotary embeddings, aren't narrow.
            pieces[-1].joins |= op.kind is OpKind.ADD and len(main) == 2
            pieces.append(_Piece())
    return [p for p in pieces if p.ops]


def _flow(graph: Graph) -> set[TensorId]:
    """Tensors that depend on a layer or an embedding."""
    found: set[TensorId] = set()
    for op in graph.ops:
        weighty = op.weight is not None and (op.kind in LINEAR_KINDS or op.kind is OpKind.EMBEDDING)
        if weighty or any(t in found for t in op.data_inputs):
            found.update(op.outputs)
    return found


def _span(graph: Graph, ops: Sequence[Op], chosen: Collection[OpId]) -> Span:
    inside = {op.id for op in ops}
    made = {t for op in ops for t in op.outputs}
    feeds = dict.fromkeys(t for op in ops for t in op.data_inputs if t not in made)
    taps = dict.fromkeys(
        t
        for op in ops
        for t in op.outputs
        if graph.tensors[t].is_float
        and (t in graph.outputs or any(user.id not in inside for user in graph.consumers(t)))
    )
    layers = tuple(op.id for op in ops if op.id in chosen)
    reached = _behind(ops, layers)
    name = layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]}"
    return Span(name, layers, tuple(feeds), tuple(t for t in taps if t in reached))


def _behind(ops: Sequence[Op], layers: Collection[OpId]) -> set[TensorId]:
    """Tensors that depend on one of the layers."""
    found: set[TensorId] = set()
    for op in ops:
        if op.id in layers or any(t in found for t in op.data_inputs):
            found.update(op.outputs)
    return found
