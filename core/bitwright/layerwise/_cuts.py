"""Cuts of a graph: where a layer-by-layer walk stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitwright.graph import Graph, Op, OpId, TensorId

RECOMPUTED_OPS = 3
"""A cut moves at the latest when so many linear ops would run again for each layer behind it."""


@dataclass(frozen=True)
class Visit:
    """One layer of the walk: run from cut `start` to where its input is; move the cut there if `moves`."""

    op: Op
    start: tuple[TensorId, ...]
    cut: tuple[TensorId, ...]
    moves: bool


def cut_before(graph: Graph, position: int) -> tuple[TensorId, ...]:
    """Tensors that cross from the ops before `position` (topological order) to those from it on."""
    before = {t for op in graph.ops[:position] for t in op.outputs} | set(graph.inputs)
    needed = dict.fromkeys(t for op in graph.ops[position:] for t in op.data_inputs)
    return tuple(t for t in needed if t in before)


def schedule(graph: Graph, ops: Sequence[OpId], *, partial: bool) -> list[Visit]:
    """Where the walk cuts the graph; deterministic, from shapes and order alone.

    A cut moves forward when the tensors there are hardly larger than those of the cut in use, or when more than
    `RECOMPUTED_OPS` linear ops would have to run again. Without partial execution it stays at the model's inputs.
    """
    position = {op.id: i for i, op in enumerate(graph.ops)}
    linear = [position[op.id] for op in graph.linear_ops]
    wanted = sorted((graph.op(o) for o in ops), key=lambda op: position[op.id])
    visits: list[Visit] = []
    at, start = 0, graph.inputs
    for op in wanted:
        here = position[op.id]
        cut = cut_before(graph, here)
        again = sum(at <= p < here for p in linear)
        moves = partial and bool(cut) and (_size(graph, cut) <= 1.25 * _size(graph, start) or again >= RECOMPUTED_OPS)
        visits.append(Visit(op, start, cut, moves))
        if moves:
            at, start = here, cut
    return visits


def _size(graph: Graph, tensors: Sequence[TensorId]) -> int:
    total = 0
    for t in tensors:
        shape = graph.tensors[t].shape if t in graph.tensors else None
        # Unknown dimensions but the first (samples) count as 64: any fixed guess keeps the schedule deterministic.
        total += int(np.prod([64 if d is None else d for d in (shape or (1, 4096))[1:]], dtype=np.int64))
    return total
