"""Tensors whose range the graph tells, and how their grids are calibrated.

Of a probability, the rare large values are what is read, and no outliers: there can't be any in a range that is known
beforehand. Of scores that are compared with each other, the largest are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from bitwright.graph import LINEAR_KINDS, ActivationAttrs, Graph, Op, OpKind, TensorId, preserves_grid, softmaxes

Range = tuple[float, float]

_RANGES: Mapping[str, Range] = {
    **dict.fromkeys(("Softmax", "Hardmax", "Sigmoid", "HardSigmoid", "OneHot", "Bernoulli"), (0.0, 1.0)),
    **dict.fromkeys(("Tanh", "Softsign", "Erf", "Sin", "Cos", "Sign"), (-1.0, 1.0)),
}
_MEANS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean", "Mean"})
_ORDER = frozenset({"ArgMax", "ArgMin", "TopK", "NonMaxSuppression"})
"""Ops that tell which value is the largest: two that are clipped are told apart no longer."""


def known_ranges(graph: Graph) -> dict[TensorId, Range]:
    """Bounds of the tensors that have some by the ops before them, whatever the data: of softmax, sigmoid, tanh and the
    like, of what moves, averages or multiplies such values, and of a softmax that is written out."""
    found: dict[TensorId, Range] = {}
    probabilities = {s.result for s in softmaxes(graph) if s.type == "Softmax"}
    for op in graph:
        bounds = (0.0, 1.0) if not probabilities.isdisjoint(op.outputs) else _bounds(op, found)
        if bounds is not None:
            found.update(dict.fromkeys(op.outputs if preserves_grid(op) else op.outputs[:1], bounds))
    return found


def _bounds(op: Op, found: Mapping[TensorId, Range]) -> Range | None:
    if op.kind is OpKind.OPAQUE:
        return None
    if op.type in _RANGES:
        return _RANGES[op.type]
    if isinstance(op.attrs, ActivationAttrs) and op.attrs.minimum is not None and op.attrs.maximum is not None:
        return op.attrs.minimum, op.attrs.maximum
    if not op.data_inputs or op.params or any(t not in found for t in op.data_inputs):
        return found.get(op.data_inputs[0]) if op.data_inputs and preserves_grid(op) else None
    ranges = [found[t] for t in op.data_inputs]
    if op.kind is OpKind.MUL and len(ranges) == len(op.inputs) == 2:
        ends = [a * b for a in ranges[0] for b in ranges[1]]
        return min(ends), max(ends)
    if preserves_grid(op):
        return ranges[0]
    if op.kind is OpKind.CONCAT or op.type in _MEANS or op.type in ("Max", "Min"):
        return min(r[0] for r in ranges), max(r[1] for r in ranges)
    return None


def compared(graph: Graph) -> frozenset[TensorId]:
    """Scores that are compared with each other: what a softmax reads, or a sigmoid whose values are read so."""
    gates = (op for op in graph if op.type in ("Sigmoid", "HardSigmoid") and op.data_inputs)
    return frozenset(
        (*(s.scores for s in softmaxes(graph)), *(op.data_inputs[0] for op in gates if _handed_out(graph, op.output)))
    )


def scheme_for(
    graph: Graph,
    known: Mapping[TensorId, Range],
    scores: AbstractSet[TensorId],
    members: Sequence[TensorId],
    seen: Sequence[TensorId],
) -> str | None:
    """The scheme of tensors with one grid where the run's is `sqnr`, whose cost gives rare large values up; or None.

    - values of a known range within [−1, 1] that are a model output, or that ArgMax or TopK reads: "minmax". The error
      is at most half a step of 1/255, and no two of the largest become equal;
    - other values of such a range (attention, gates): "mse", the least noise for what they are multiplied with;
    - scores: what a softmax, ArgMax or TopK reads, or a sigmoid whose values are read so (detections), and model
      outputs that a linear op computes: "scores".

    Args:
        graph: the model.
        known: its `known_ranges`.
        scores: its tensors that are `compared`.
        members: all tensors that share the grid.
        seen: those that it is calibrated on.
    """
    readers = [op for t in members for op in graph.consumers(t)]
    output = any(t in graph.outputs for t in members)
    ordered = any(op.type in _ORDER for op in readers)
    if all(t in known and known[t][0] >= -1 and known[t][1] <= 1 for t in seen):
        return "minmax" if output or ordered else "mse"
    read = ordered or not scores.isdisjoint(members)
    return "scores" if read or (output and any(_linear(graph, t) for t in seen)) else None


def _linear(graph: Graph, tensor: TensorId) -> bool:
    """Whether a linear op computes a tensor, its bias perhaps added by an op of its own."""
    op = graph.producer(tensor)
    if op is not None and op.kind is OpKind.ADD and len(op.data_inputs) == 1:
        op = graph.producer(op.data_inputs[0])
    return op is not None and op.kind in LINEAR_KINDS


def _handed_out(graph: Graph, tensor: TensorId) -> bool:
    """Whether a tensor's values reach a model output, ArgMax or TopK, moved, joined or multiplied at most."""
    queue, seen = [tensor], {tensor}
    for t in queue:
        if t in graph.outputs:
            return True
        for op in graph.consumers(t):
            if op.type in _ORDER:
                return True
            if preserves_grid(op) or op.kind in (OpKind.MUL, OpKind.CONCAT):
                queue += [o for o in op.outputs if o not in seen]
                seen.update(op.outputs)
    return False
