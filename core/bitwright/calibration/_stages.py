"""Where a network is cut so that only some of the values that statistics are updated with are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bitwright.backend import Part, Tap, parts_at
from bitwright.graph import Graph, OpKind, TensorId
from bitwright.statistics import Source

TAP_BYTES = 2**21
"""Bytes of one batch's taps that are in memory together, unless the network's own values take more."""
OTHERWISE_IN_BLOCKS = frozenset({OpKind.AVERAGE_POOL, OpKind.BATCH_NORM, OpKind.RESIZE})
IN_BLOCKS = frozenset({
    OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.ADD, OpKind.MUL, OpKind.ELEMENTWISE,
    OpKind.CONCAT, OpKind.MAX_POOL, OpKind.IDENTITY,
})  # fmt: skip
"""Ops that runtimes may run on tensors in blocks of channels, with other results or the same."""
HALF = ("float16", "bfloat16")
UNKNOWN = 64
"""In place of a dimension that isn't known."""


def stages_of(graph: Graph, taps: Mapping[Source, Iterable[Tap]], samples: int) -> list[Part]:
    """The stages in which each batch runs through a network: neighbouring ops, one stage where its taps are few.

    What the taps of a stage hand out of a batch takes no more than `TAP_BYTES`, or than what the network itself has in
    memory at a time where that is more, or is of a single op. A cut is made only where each tensor that crosses it is
    one that the runtime computes as it is in any case, since it is handed out: elsewhere a cut could keep a runtime
    from fusing ops, which changes last bits. That several ops read a tensor doesn't tell so: they may be those of one
    layer normalization. Tensors of half precision never do, of which ops may read the single precision that they were
    computed in, nor those that `_blocked` names. It depends on the graph, the taps and the size of a batch alone.

    Args:
        graph: of the network.
        taps: of each network that is run.
        samples: of a batch.
    """
    values = {t: _values(graph, t) for t in (*graph.inputs, *(t for op in graph.ops for t in op.outputs))}
    out = _handed_out(taps, values)
    sizes = [sum(out.get(t, 0) for t in op.outputs) * 4 * samples for op in graph.ops]
    crossing = _crossing(graph)
    budget = max(TAP_BYTES, _own_bytes(graph, values, crossing) * samples)
    if sum(sizes) <= budget:
        return parts_at(graph, [])
    tapped, blocked = [{tap.tensor for tap in of_one} for of_one in taps.values()], _blocked(graph)

    def stands(tensor: TensorId) -> bool:
        known = graph.tensors.get(tensor)
        if tensor in graph.inputs or (known is not None and not known.is_float):
            return True
        half = known is not None and known.dtype in HALF
        return not half and tensor not in blocked and all(tensor in some for some in tapped)

    places = [i > 0 and all(map(stands, before)) for i, before in enumerate(crossing)]
    return parts_at(graph, _cuts(sizes, places, [sum(map(values.__getitem__, c)) for c in crossing], budget))


def _blocked(graph: Graph) -> set[TensorId]:
    """What ops read, or others of which they read, that may have kernels of their own for blocks of channels.

    Behind a convolution runtimes keep tensors in such blocks, through elementwise ops too, as far as ops can take them.
    Those that add up values or multiply them in another order then give other last bits than on a plain tensor.
    """
    found: set[TensorId] = set()
    for op in reversed(graph.ops):
        other = op.kind in OTHERWISE_IN_BLOCKS and op.type != "ReduceMean"
        if other or (op.kind in IN_BLOCKS and not found.isdisjoint(op.outputs)):
            found.update(t for t in op.data_inputs if _may_be_blocked(graph, t))
    return found


def _may_be_blocked(graph: Graph, tensor: TensorId) -> bool:
    """Whether it has channels and two axes of places."""
    shape = graph.tensors[tensor].shape if tensor in graph.tensors else None
    return shape is None or len(shape) == 4


def crossing_bytes(graph: Graph, stages: Sequence[Part]) -> int:
    """Most bytes of a sample that cross from one stage to the next."""
    return 4 * max(sum(_values(graph, t) for t in stage.crossing) for stage in stages)


def _own_bytes(graph: Graph, values: Mapping[TensorId, int], crossing: Sequence[Iterable[TensorId]]) -> int:
    """Most bytes of a sample that the network has in memory while one of its ops runs."""
    pairs = zip(crossing, graph.ops, strict=True)
    return 4 * max((sum(values[t] for t in {*before, *op.outputs}) for before, op in pairs), default=0)


def _values(graph: Graph, tensor: TensorId) -> int:
    """Of one sample."""
    shape = graph.tensors[tensor].shape if tensor in graph.tensors else None
    return int(np.prod([UNKNOWN if d is None else d for d in (shape or (1, UNKNOWN**2))[1:]], dtype=np.int64))


def _handed_out(taps: Mapping[Source, Iterable[Tap]], values: Mapping[TensorId, int]) -> dict[TensorId, int]:
    """Values of one sample that are handed out of each tensor; of extremes there are next to none."""
    found: dict[TensorId, int] = {}
    for tap in (tap for of_one in taps.values() for tap in of_one):
        if tap.reduce == "none":
            found[tap.tensor] = found.get(tap.tensor, 0) + -(-values.get(tap.tensor, 0) // tap.step)
    return found


def _crossing(graph: Graph) -> list[tuple[TensorId, ...]]:
    """Tensors that are there when each op runs, for it or for one behind it."""
    last = {t: i for i, op in enumerate(graph.ops) for t in op.data_inputs}
    alive = [t for t in graph.inputs if t in last]
    found = []
    for index, op in enumerate(graph.ops):
        found.append(tuple(alive))
        alive = [t for t in (*alive, *op.outputs) if last.get(t, -1) > index]
    return found


def _cuts(sizes: Sequence[int], places: Sequence[bool], crossing: Sequence[int], budget: int) -> list[int]:
    """Indices of the ops that stages begin with, of the places that there are."""
    totals = np.cumsum([0, *sizes])
    cuts: list[int] = []
    start, open = 0, list[int]()
    for index, size in enumerate(sizes):
        if places[index] and totals[index] > totals[start]:
            open.append(index)
        if open and totals[index] + size - totals[start] > budget:
            # Of the stage's second half, where the least crosses; of such places the last.
            half = (totals[start] + totals[open[-1]]) / 2
            start = min((i for i in reversed(open) if totals[i] > half), key=lambda i: crossing[i])
            cuts.append(start)
            open = [i for i in open if i > start and totals[i] > totals[start]]
    return cuts
