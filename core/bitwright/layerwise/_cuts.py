"""Cuts of a graph: where a layer-by-layer walk stops, and what it keeps there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch
from bitwright.graph import Graph, Op, OpId, TensorId

CACHE_BYTES = 128 * 2**20
"""Memory for the tensors of one cut, both networks together; what exceeds it goes to disk."""
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


class CutCache:
    """The tensors of one cut for every batch, in memory up to `budget` bytes and in a temporary folder beyond."""

    def __init__(self, budget: int = CACHE_BYTES) -> None:
        self._budget = budget
        self._held = 0
        self._batches: list[dict[TensorId, NDArray[Any] | Path]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, batch: Mapping[TensorId, NDArray[Any]]) -> None:
        """Keep one more batch."""
        kept: dict[TensorId, NDArray[Any] | Path] = {}
        for name, values in batch.items():
            if self._held + values.nbytes > self._budget:
                kept[name] = self._spill(values, len(self._batches), len(kept))
            else:
                self._held += values.nbytes
                kept[name] = values
        self._batches.append(kept)

    def _spill(self, values: NDArray[Any], batch: int, index: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="bitwright-")
        path = Path(self._folder.name) / f"{batch}-{index}.npy"
        np.save(path, values, allow_pickle=False)
        return path

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            # Read when its turn comes: a map of the file would stay in the process's memory.
            yield {t: np.load(v, allow_pickle=False) if isinstance(v, Path) else v for t, v in batch.items()}

    def close(self) -> None:
        """Free memory and disk."""
        self._batches = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
