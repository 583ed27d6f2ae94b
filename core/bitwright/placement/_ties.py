"""Shared grids: which activations must or may use one encoding, and which of them it is calibrated on.

An edge (a, b) says that a and b share a grid and that a's values cover b's: an op that only moves values covers its
output by its input, a concatenation covers its inputs by its output. Edges of the first kind follow the flow, of the
second go against it, and no covering path can do both and come back; so each group has tensors that nothing covers.
The one that covers most is the group's root, and the encoding has to serve all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bitwright.graph import Op, OpKind, RecurrentAttrs, Tensor, TensorId
from bitwright.placement._activations import ActivationPlacement
from bitwright.placement._plan import SiteId

Edge = tuple[TensorId, TensorId]


@dataclass(frozen=True)
class Ties:
    """Groups of tensors with one grid.

    Attributes:
        parent: site → the neighbour whose encoding it takes; following parents ends at the group's root.
        root: site → root, for every member of a group.
        observed: root → the tensors whose values together span the group's range, itself first.
    """

    parent: Mapping[SiteId, SiteId]
    root: Mapping[SiteId, SiteId]
    observed: Mapping[SiteId, tuple[SiteId, ...]]

    def members(self, root: SiteId) -> tuple[SiteId, ...]:
        """All tensors of a group."""
        return tuple(s for s, r in self.root.items() if r == root)


def propagate(placement: ActivationPlacement) -> list[Edge]:
    """Decide every tensor that depends on its neighbours, in topological order, and list the ties.

    A tensor behind an op that preserves the grid takes its input's; where the input is float, it gets a grid of its
    own if a quantized op reads it. Tensors that were given different precisions aren't tied, nor is any whose grid
    suits it alone (`Precision.is_own`).
    """
    graph, drafts = placement.graph, placement.drafts
    edges: list[Edge] = []

    def alone(tensor: TensorId) -> bool:
        precision = drafts[tensor].precision
        return drafts[tensor].on and precision is not None and precision.is_own

    def alike(a: TensorId, b: TensorId) -> bool:
        if alone(a) or alone(b):
            return False
        return drafts[a].on and drafts[b].on and drafts[a].precision == drafts[b].precision

    for op in graph:
        if placement.follows(op):
            source = op.data_inputs[0]
            for t in op.outputs:
                draft = drafts[t]
                own = draft.precision is not None and not (
                    drafts[source].on and draft.precision == drafts[source].precision
                )
                if draft.final or own or alone(t):
                    continue
                if drafts[source].on and not alone(source):
                    draft.on = True
                    edges.append((source, t))
                elif t not in placement.needed or not (_is_real(graph.tensors[source]) or op.type == "Cast"):
                    draft.off(f"its input {source!r} {'has been rounded' if drafts[source].on else 'stays in float'}")
        elif op.kind is OpKind.RECURRENT:
            states, last = _hidden_states(op)
            if states is not None and last is not None and alike(states, last):
                edges.append((states, last))
        elif op.type in placement.config.bitwright.ties and placement.floats(op) is None:
            edges += [(op.output, t) for t in dict.fromkeys(op.data_inputs) if alike(op.output, t)]
    return edges


def _is_real(tensor: Tensor) -> bool:
    """Whether it holds floats; those of a mask have no grid, but what is chosen of them may."""
    return tensor.is_float or tensor.mask


def _hidden_states(op: Op) -> tuple[TensorId | None, TensorId | None]:
    """All hidden states and the last one, where a recurrent op gives both; the cell state is neither.

    Of an op that doesn't tell its outputs, only a whole set of them tells which is which.
    """
    whole = (0, 1, 2) if op.type == "LSTM" else (0, 1)
    slots = op.attrs.outputs if isinstance(op.attrs, RecurrentAttrs) else whole
    if len(slots) != len(op.outputs):
        return None, None
    found = dict(zip(slots, op.outputs, strict=True))
    return found.get(0), found.get(1)


def resolve(order: Iterable[TensorId], edges: Iterable[Edge]) -> Ties:
    """Groups, roots and parents.

    Args:
        order: every tensor, topologically sorted; makes the choice of roots deterministic.
        edges: (covering, covered) pairs.
    """
    below: dict[TensorId, list[TensorId]] = {}
    near: dict[TensorId, list[TensorId]] = {}
    covered: set[TensorId] = set()
    for a, b in edges:
        below.setdefault(a, []).append(b)
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
        covered.add(b)
    rank = {t: i for i, t in enumerate(order)}
    parent: dict[SiteId, SiteId] = {}
    root: dict[SiteId, SiteId] = {}
    observed: dict[SiteId, tuple[SiteId, ...]] = {}
    for start in rank:
        if start not in near or start in root:
            continue
        group = _reach(start, near)
        tops = sorted((t for t in group if t not in covered), key=lambda t: (-len(_reach(t, below)), rank[t]))
        top = tops[0]
        observed[top] = tuple(tops)
        parent.update({t: p for t, p in _reach(top, near).items() if p is not None})
        root.update(dict.fromkeys(group, top))
    return Ties(parent, root, observed)


def _reach(start: TensorId, near: Mapping[TensorId, list[TensorId]]) -> dict[TensorId, TensorId | None]:
    """Everything reachable, with the neighbour that it was first reached from (breadth first)."""
    found: dict[TensorId, TensorId | None] = {start: None}
    queue = [start]
    for t in queue:
        for other in near.get(t, ()):
            if other not in found:
                found[other] = t
                queue.append(other)
    return found
