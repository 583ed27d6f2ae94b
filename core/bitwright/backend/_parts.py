"""Large networks run part by part: the parameters of one part are in memory, and not those of the whole network."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bitwright.backend._giving_back import giving_back
from bitwright.backend._protocols import Batch, Session
from bitwright.backend._settled import settled
from bitwright.backend._taps import Tap
from bitwright.files import Array
from bitwright.graph import Graph, OpId, ParamId, TensorId

WHOLE_BYTES = 2**27
"""Bytes of parameters (as float32) of a network that is run as a whole."""
PART_BYTES = 2**26
"""Bytes of parameters of a part of a larger one, where no single op has more."""
FEW = 4, 2
"""By how much both are less where few samples run, as when exports are compared. Of many samples, the values that cross
between two parts are kept, which costs time and disk; of few it doesn't."""

GC_SHARE = 0.05
"""Of the time of many small steps, what the collector may take."""
GC_SECONDS = 0.05
"""What a collection is taken to cost before there was one."""


@dataclass(frozen=True)
class Part:
    """Neighbouring ops of a network, in its order.

    Attributes:
        crossing: tensors from before it, inputs of the network among them, that it or an op behind it reads.
        computed: tensors that its ops compute; of the first part the network's inputs too.
        ops: their ids.
        params: those of its ops.
    """

    crossing: tuple[TensorId, ...]
    computed: frozenset[TensorId]
    ops: tuple[OpId, ...]
    params: frozenset[ParamId]


def parts_of(graph: Graph, part_bytes: int | None = None, *, few: bool = False) -> list[Part]:
    """The parts of a network: one where its parameters are few, else cut where few values cross.

    It depends on the graph alone, so that a run that goes on computes the same.

    Args:
        graph: of the network.
        part_bytes: bytes of parameters of a part, where no single op has more; default: `PART_BYTES`.
        few: whether few samples run through them, so that smaller networks and parts are worth it (see `FEW`).
    """
    sizes = _parameter_bytes(graph)
    whole, part = (size // (by if few else 1) for size, by in zip((WHOLE_BYTES, PART_BYTES), FEW, strict=True))
    return parts_at(graph, [] if sum(sizes) <= whole else _cuts(sizes, _crossing_values(graph), part_bytes or part))


def parts_at(graph: Graph, cuts: Sequence[int]) -> list[Part]:
    """A network in parts; `cuts` are the indices, rising, of the ops that all parts but the first begin with."""
    born = dict.fromkeys(graph.inputs, -1) | {t: i for i, op in enumerate(graph.ops) for t in op.outputs}
    last = {t: i for i, op in enumerate(graph.ops) for t in op.data_inputs}
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(graph.ops)], strict=True):
        ops = graph.ops[start:stop]
        parts.append(
            Part(
                tuple(t for t, i in born.items() if start > 0 and i < start <= last.get(t, -1)),
                frozenset(t for op in ops for t in op.outputs) | frozenset(() if start else graph.inputs),
                tuple(op.id for op in ops),
                frozenset(p for op in ops for p in op.params.values()),
            )
        )
    return parts


def _parameter_bytes(graph: Graph) -> list[int]:
    """Bytes of the parameters that each op is the first to read."""
    seen: set[ParamId] = set()
    sizes = []
    for op in graph.ops:
        own = set(op.params.values()) - seen
        seen |= own
        sizes.append(sum(4 * int(np.prod(graph.params[p].shape, dtype=np.int64)) for p in own if p in graph.params))
    return sizes


def _crossing_values(graph: Graph) -> list[int]:
    """Values a sample that cross to each op from those before it; unknown dimensions count as 64."""
    change = [0] * (len(graph.ops) + 1)
    last = {t: i for i, op in enumerate(graph.ops) for t in op.data_inputs}
    for index, op in enumerate(graph.ops):
        for tensor in op.outputs:
            if last.get(tensor, -1) > index:
                shape = graph.tensors[tensor].shape if tensor in graph.tensors else None
                values = int(np.prod([64 if d is None else d for d in (shape or (1, 4096))[1:]], dtype=np.int64))
                change[index + 1] += values
                change[last[tensor] + 1] -= values
    return [int(n) for n in np.cumsum(change)[:-1]]


def _cuts(sizes: Sequence[int], crossing: Sequence[int], part_bytes: int) -> list[int]:
    """Indices of the ops that parts begin with."""
    cuts: list[int] = []
    start, held = 0, 0
    totals = np.cumsum([0, *sizes])
    for index, size in enumerate(sizes):
        if held and held + size > part_bytes:
            # Anywhere in the part's second half, the least crosses; the latest such place.
            places = [i for i in range(start + 1, index + 1) if totals[i] - totals[start] > held // 2]
            start = min(reversed(places), key=lambda i: crossing[i])
            cuts.append(start)
            held = int(totals[index] - totals[start])
        held += size
    return cuts


def let_go() -> None:
    """Give memory back of parts that aren't needed any more.

    Models are full of circles, which keep their weights until the collector comes; and the C library keeps freed arrays
    of some megabytes for itself, unless it is asked for them (glibc).
    """
    gc.collect()
    trim()


def trim() -> None:
    """Give back what the C library keeps of arrays that were freed, without looking for more of them.

    Not where MALLOC_TRIM_THRESHOLD_ is set: who sets it has said what the C library is to keep.
    """
    if _trim is not None:
        _trim(0)


class LettingGo:
    """`let_go` between many small steps: `trim` each time, the collector as often as costs `GC_SHARE` of the time.

    Both are needed for memory that doesn't grow: sessions leave circles behind, and what is kept of each step would lie
    among pieces of memory that were used once, so that these never went back.
    """

    def __init__(self) -> None:
        self._cost, self._since = GC_SECONDS, time.perf_counter()

    def __call__(self) -> None:
        """Between two steps."""
        begin = time.perf_counter()
        if begin - self._since > self._cost / GC_SHARE:
            gc.collect()
            self._since = time.perf_counter()
            self._cost = self._since - begin
        trim()


_trim: Any = None
with suppress(AttributeError, OSError, TypeError):
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        _trim = ctypes.CDLL(None).malloc_trim


class Divisible(Protocol):
    """A network that can be run from tensors inside of it."""

    def session(self, taps: Sequence[Tap]) -> Session:
        """Compile it for its own inputs."""

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """Compile what lies between; a fed tensor is taken as it is given."""


def session_in_parts(graph: Graph, network: Divisible, taps: Sequence[Tap], part_bytes: int | None = None) -> Session:
    """A session for few batches: each part of a large network is compiled, run and let go for each of them.

    Args:
        graph: of the network.
        network: a simulation, or another form of it, with the tensors of the graph.
        taps: as for `Backend.session`.
        part_bytes: bytes of parameters of a part; default: that of `parts_of` for few samples.
    """
    parts = parts_of(graph, part_bytes, few=True)
    known = {t for part in parts for t in part.computed}
    if len(parts) == 1 or any(tap.tensor not in known for tap in taps):
        return network.session(taps)
    return _InParts(graph.inputs, parts, network, tuple(taps))


@dataclass(frozen=True)
class _InParts:
    inputs: Collection[TensorId]
    parts: Sequence[Part]
    network: Divisible
    taps: tuple[Tap, ...]

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """Feed one batch."""
        with giving_back(), settled():
            return self._run(batch)

    def _run(self, batch: Batch) -> dict[Tap, Array]:
        found: dict[Tap, Array] = {}
        held: dict[TensorId, Array] = {}
        for index, part in enumerate(self.parts):
            own = [tap for tap in self.taps if tap.tensor in part.computed]
            after = self.parts[index + 1].crossing if index + 1 < len(self.parts) else ()
            passed = [Tap(t) for t in after if t not in held]
            wanted = list(dict.fromkeys([*own, *passed]))
            if not wanted:
                held = {t: held[t] for t in after}
                continue
            if index == 0:
                session = self.network.session(wanted)
            else:
                # Sizes are often computed from the inputs, which therefore stay at hand.
                inputs = [t for t in self.inputs if t in batch]
                session = self.network.segment(list(dict.fromkeys([*held, *inputs])), wanted)
            run = session.run({**batch, **held})
            found.update((tap, run[tap]) for tap in own)
            held = {t: held[t] if t in held else np.asarray(run[Tap(t)]) for t in after}
            del session
            let_go()
        return {tap: found[tap] for tap in self.taps}
