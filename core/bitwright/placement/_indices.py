"""Which float tensors hold no signal: indices that arrive as floats, and what is only compared or counted.

A grid of 256 values keeps no token ids. So what is read only as indices, shapes or conditions stays as it is, back
through casts, changes of form and arithmetic, up to the model's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bitwright.graph import Graph, Op, OpId, OpKind, TensorId

_ELEMENTWISE = frozenset({OpKind.ADD, OpKind.MUL, OpKind.ELEMENTWISE})
_MOVING = frozenset(
    {OpKind.RESHAPE, OpKind.TRANSPOSE, OpKind.SLICE, OpKind.SPLIT, OpKind.IDENTITY, OpKind.CONCAT, OpKind.PAD}
)
_ARITHMETIC = frozenset(
    """
    Abs Add Cast Ceil Clip Concat Div Expand Flatten Floor Identity Max Min Mod Mul Neg Pad Reshape Round Sign Slice
    Split Squeeze Sub Sum Tile Transpose Unsqueeze
    """.split()  # noqa: SIM905
)
"""Types that make indices of indices, whatever numbers they work on."""
OUTSIDE = "object"
"""Type of what only code outside of the graph handles."""
_LOOKUPS = frozenset({"Gather", "GatherElements", "GatherND"})
_CHOOSING = frozenset({"ArgMax", "ArgMin", "NonMaxSuppression", "TopK", "Unique", "Multinomial"})
"""Types that give whole numbers but read a signal."""


@dataclass(frozen=True)
class Indices:
    """What is read otherwise than as a signal.

    Attributes:
        only: float tensors that are read as indices, shapes or conditions and as nothing else.
        both: float tensors that are indices and a signal too → (an op that reads it as the one, as the other).
    """

    only: frozenset[TensorId]
    both: dict[TensorId, tuple[OpId, OpId]]


@dataclass
class _Uses:
    """The first op, in order, that reads a tensor as each of these."""

    index: OpId | None = None
    test: OpId | None = None
    signal: OpId | None = None

    def add(self, other: _Uses) -> None:
        self.index, self.test = other.index or self.index, other.test or self.test
        self.signal = other.signal or self.signal


def find_indices(graph: Graph) -> Indices:
    """Sort the uses of every float tensor, from the last op back."""
    uses: dict[TensorId, _Uses] = {t: _Uses() for t in graph.tensors}
    for t in graph.outputs:
        uses[t].signal = "the model's caller"
    for op in reversed(graph.ops):
        for tensor, use in _reads(graph, op, uses):
            uses[tensor].add(use)
    floats = {t: u for t, u in uses.items() if graph.tensors[t].is_float}
    only = {t for t, u in floats.items() if u.signal is None and (u.index or u.test)}
    both = {t: (u.index, u.signal) for t, u in floats.items() if u.index is not None and u.signal is not None}
    return Indices(frozenset(only), both)


def _reads(graph: Graph, op: Op, uses: dict[TensorId, _Uses]) -> Iterator[tuple[TensorId, _Uses]]:
    floats = [t for t in op.outputs if graph.tensors[t].is_float or graph.tensors[t].mask]
    for place, tensor in enumerate(op.inputs):
        if tensor is None:
            continue
        if op.kind is OpKind.EMBEDDING or op.type == "OneHot" or (op.type in _LOOKUPS and place > 0):
            yield tensor, _Uses(index=op.id)
        elif any(graph.tensors[t].dtype == OUTSIDE for t in op.outputs):
            yield tensor, _Uses(signal=op.id)  # code outside of the graph: nobody knows what it does
        elif not floats and op.type in _CHOOSING:
            yield tensor, _Uses(signal=op.id)
        elif not floats:
            # What becomes of numbers that were cast to whole ones decides what they are; a comparison tests.
            kept = _Uses(test=op.id)
            for t in op.outputs if op.type in _ARITHMETIC else ():
                kept.add(uses[t])
            yield tensor, kept
        elif op.kind in _MOVING | _ELEMENTWISE or op.type in _ARITHMETIC:
            for t in floats:
                yield tensor, uses[t]
        else:
            yield tensor, _Uses(signal=op.id)
