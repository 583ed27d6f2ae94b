"""Outputs that quantization has silenced, alone or in parts, while the whole looks well.

A concatenation has one grid for all that it joins. Boxes in pixels beside scores between 0 and 1 leave the scores one
code; the output's signal to noise doesn't show it, as it is that of the boxes. The same happens where a layer's own
channels, a product with a vector, a sum of padded parts or a selection (Where) put values of other sizes side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Session, Tap
from bitwright.graph import LINEAR_KINDS, ActivationAttrs, AxisAttrs, Graph, Op, OpKind, TensorId
from bitwright.placement import Plan

CRUSHED_DB = 3.0
"""Signal to noise of a part, in decibels, below which half of its power or more is noise."""
KEEPING = frozenset({OpKind.RESHAPE, OpKind.TRANSPOSE, OpKind.SLICE, OpKind.IDENTITY, OpKind.PAD})
"""Ops that hand values on as they are."""
POOLING = frozenset({OpKind.MAX_POOL, OpKind.AVERAGE_POOL, OpKind.RESIZE})
"""Ops that put together or repeat what lies side by side, and leave channels apart."""
POINTWISE = frozenset(
    {OpKind.ADD, OpKind.MUL, OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.ELEMENTWISE,
     OpKind.BATCH_NORM}
)  # fmt: skip
"""Ops whose values stay where they are if all but one of their operands are constants."""
MIXING = LINEAR_KINDS | {OpKind.ADD, OpKind.MUL, OpKind.ELEMENTWISE, OpKind.MATMUL, OpKind.BATCH_NORM}
"""Ops whose channels may be of any sizes. Not those after which values are alike (norms of a sample's own values), nor
activations: what is rarely active is small without being a part of its own."""
SELECTING = frozenset({"Where", "ScatterND", "ScatterElements"})
"""Op types that put values of several tensors side by side, along any axis."""
FAINT = 1e-3
"""Power of a slice, of that of the strongest one, below which its values are of another size."""
SHARE = 8
"""One slice of so many that is silenced is a part of the output; fewer may be idle channels."""
BOUNDED = frozenset({"Sigmoid", "HardSigmoid", "Softmax", "Hardmax", "Tanh"})
"""Op types whose values lie between −1 and 1, whatever comes in."""


@dataclass(frozen=True)
class Joined:
    """A concatenation that an output consists of.

    Attributes:
        output: the model's.
        op: the concatenation.
        axis: along which it joins.
        inputs: what it joins.
        carried: the last tensor, on the way to the output, in which the parts lie as in the concatenation.
    """

    output: TensorId
    op: Op
    axis: int
    inputs: tuple[TensorId, ...]
    carried: TensorId


def joined(graph: Graph) -> list[Joined]:
    """Concatenations that reach an output through nothing but ops that keep values, or change each by itself; nested
    ones too."""
    found: dict[str, Joined] = {}
    for output in graph.outputs:
        stack = [(output, output)]
        while stack:
            tensor, carried = stack.pop()
            op = graph.producer(tensor)
            if op is None:
                continue
            read = [t for t in op.data_inputs if graph.tensors[t].is_float]
            if op.kind in KEEPING:
                stack += [(t, carried if op.kind is OpKind.IDENTITY else t) for t in read]
            elif len(read) == 1 and (op.kind in POINTWISE or (op.kind in POOLING and _same_rank(graph, op))):
                stack.append((read[0], carried))
            elif op.kind is OpKind.CONCAT and isinstance(op.attrs, AxisAttrs) and op.id not in found:
                found[op.id] = Joined(output, op, op.attrs.axis, op.data_inputs, carried)
                stack += [(t, t) for t in op.data_inputs]
    return list(found.values())


def _same_rank(graph: Graph, op: Op) -> bool:
    """Whether a channel has the same place in what the op reads and in its result."""
    shapes = [graph.tensors[t].shape for t in (op.data_inputs[0], op.output)]
    return all(s is not None for s in shapes) and len({len(s or ()) for s in shapes}) == 1


@dataclass
class _Sums:
    signal: float = 0.0
    noise: float = 0.0

    def add(self, real: NDArray[Any], simulated: NDArray[Any]) -> None:
        a, b = np.asarray(real, np.float64), np.asarray(simulated, np.float64)
        finite = np.isfinite(a) & np.isfinite(b)
        self.signal += float(np.square(a[finite]).sum())
        self.noise += float(np.square(b[finite] - a[finite]).sum())

    @property
    def decibels(self) -> float | None:
        if self.signal <= 0:
            return None
        return float("inf") if self.noise == 0 else 10 * float(np.log10(self.signal / self.noise))


@dataclass
class _Slices:
    """Signal and noise of each index along an axis."""

    signal: NDArray[np.float64]
    noise: NDArray[np.float64]

    @classmethod
    def of(cls, real: NDArray[Any], simulated: NDArray[Any], axis: int) -> _Slices:
        a, b = np.asarray(real, np.float64), np.asarray(simulated, np.float64)
        finite = np.isfinite(a) & np.isfinite(b)
        others = tuple(i for i in range(a.ndim) if i != axis)
        signal, noise = np.where(finite, a, 0), np.where(finite, b - a, 0)
        return cls(np.square(signal).sum(axis=others), np.square(noise).sum(axis=others))

    def merged(self, other: _Slices) -> _Slices:
        return _Slices(self.signal + other.signal, self.noise + other.noise)

    def silenced(self) -> list[int]:
        """Indices of slices of another size than the strongest one, of which nothing is left."""
        faint = (self.signal > 0) & (self.signal < FAINT * self.signal.max(initial=0))
        gone = np.flatnonzero(faint & (self.signal < 10 ** (CRUSHED_DB / 10) * self.noise))
        return gone.tolist() if len(gone) * SHARE >= len(self.signal) else []


@dataclass
class OutputQuality:
    """Signal to noise of a model's outputs and of the parts that they are joined from, batch by batch.

    Args:
        graph: the model's.
    """

    graph: Graph
    _whole: dict[TensorId, _Sums] = field(default_factory=dict)
    _parts: dict[tuple[str, TensorId], _Sums] = field(default_factory=dict)
    _slices: dict[tuple[TensorId, int], _Slices] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.joined = joined(self.graph)
        # An output that is an input is handed out as it came.
        made = [t for t in self.graph.outputs if t not in self.graph.inputs]
        outputs = [t for t in made if self.graph.tensors[t].is_float]
        inside = [t for j in self.joined for t in (*j.inputs, j.op.output, j.carried)]
        self.taps = tuple(Tap(t) for t in dict.fromkeys([*outputs, *inside]))
        self._outputs = outputs

    def run(self, real: Session, simulated: Session, batches: Iterable[Batch]) -> OutputQuality:
        """Add batches that both sessions, compiled for `taps`, run."""
        for batch in batches:
            self.add({t.tensor: v for t, v in real.run(batch).items()},
                     {t.tensor: v for t, v in simulated.run(batch).items()})  # fmt: skip
        return self

    def add(self, real: dict[TensorId, NDArray[Any]], simulated: dict[TensorId, NDArray[Any]]) -> None:
        """Add one batch: tensors of `taps` in the float network and in the simulation."""
        for tensor in self._outputs:
            if np.shape(real[tensor]) == np.shape(simulated[tensor]):
                self._whole.setdefault(tensor, _Sums()).add(real[tensor], simulated[tensor])
                for axis in _part_axes(self.graph, tensor, np.ndim(real[tensor])):
                    made, key = _Slices.of(real[tensor], simulated[tensor], axis), (tensor, axis)
                    known = self._slices.get(key)
                    if known is None or known.signal.shape == made.signal.shape:
                        self._slices[key] = made if known is None else known.merged(made)
        for join in self.joined:
            floats, start = np.asarray(real[join.op.output]), 0
            before, after = np.asarray(real[join.carried]), np.asarray(simulated[join.carried])
            for tensor in join.inputs:
                value = np.asarray(real[tensor])
                if value.ndim == floats.ndim - 1:  # stacked along a new axis
                    value = np.expand_dims(value, join.axis)
                place = _place(floats, value, join.axis, start)
                alike = before.shape == after.shape and before.ndim == floats.ndim
                if place is not None and alike and before.shape[join.axis] == floats.shape[join.axis]:
                    start = place + value.shape[join.axis]
                    part = [np.take(x, range(place, start), axis=join.axis) for x in (before, after)]
                    self._parts.setdefault((join.op.id, tensor), _Sums()).add(*part)

    @property
    def decibels(self) -> dict[TensorId, float | None]:
        """Signal to noise of each float output; None where the float network's is nothing but zeros."""
        return {t: s.decibels for t, s in self._whole.items()}

    def crushed(self) -> list[str]:
        """What nothing is left of, in words."""
        found = []
        for tensor, sums in self._whole.items():
            if (db := sums.decibels) is not None and db < CRUSHED_DB:
                found.append(f"output {tensor!r} is crushed: {db:.1f} dB of signal to quantization noise")
        for join in self.joined:
            for tensor in join.inputs:
                sums = self._parts.get((join.op.id, tensor), _Sums())
                if (db := sums.decibels) is None or db >= CRUSHED_DB:
                    continue
                whole = self._whole.get(join.output, _Sums()).decibels
                beside = "" if whole is None else f", while the whole output has {whole:.1f} dB"
                found.append(
                    f"{tensor!r} is crushed in output {join.output!r}: {db:.1f} dB{beside}. {join.op.id!r} "
                    f"({join.op.type}) puts it on one grid with what has another range: give the output and "
                    f"{join.op.output!r} 16 bits, or make two outputs of it"
                )
        named = {j.output for j in self.joined if any(repr(j.output) in text for text in found)}
        for (tensor, axis), slices in self._slices.items():
            gone, whole = slices.silenced(), self._whole[tensor].decibels
            if not gone or tensor in named or whole is None or whole < CRUSHED_DB:
                continue
            named.add(tensor)
            found.append(
                f"{len(gone)} of {len(slices.signal)} slices of output {tensor!r} along axis {axis} are crushed "
                f"({_numbers(gone)}): less than {CRUSHED_DB:.0f} dB is left of them, while the whole output has "
                f"{whole:.1f} dB. Their values are far smaller than the others, with which they share one grid: give "
                f"{tensor!r} and what it is computed from 16 bits, or make two outputs of it"
            )
        return found


def _part_axes(graph: Graph, output: TensorId, rank: int) -> tuple[int, ...]:
    """Axes along which an output may hold parts of different sizes, as far as its ops tell."""
    op = graph.producer(output)
    while op is not None and op.kind in KEEPING | POOLING and op.data_inputs:
        op = graph.producer(op.data_inputs[0])
    if op is None or op.type in BOUNDED:
        return ()
    if op.type in SELECTING:  # of whatever kind: a backend may not say what it computes
        return tuple(range(1, rank))
    if op.kind not in MIXING:
        return ()
    known = graph.tensors[output].channel_axis
    return tuple(sorted({1, rank - 1} if known is None else {known % rank} - {0})) if rank > 1 else ()


def _numbers(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:6])) + (", …" if len(indices) > 6 else "")


def _place(whole: NDArray[Any], part: NDArray[Any], axis: int, start: int) -> int | None:
    """Where a part begins in what was joined, from `start` on: constants, which aren't shown as inputs, lie between."""
    if part.ndim != whole.ndim or part.size == 0:
        return None
    length = part.shape[axis]
    for at in range(start, whole.shape[axis] - length + 1):
        if np.array_equal(np.take(whole, range(at, at + length), axis=axis), part, equal_nan=True):
            return at
    return None


def risky(graph: Graph, plan: Plan) -> list[tuple[str, str]]:
    """Concatenations of bounded and unbounded values that reach an output on 8 bits or fewer: op, and why."""
    found = []
    for join in joined(graph):
        spec = plan.spec(join.op.output) or plan.spec(join.carried)  # fused into what follows
        if spec is None or spec.float_format is not None or spec.bits > 8:
            continue
        bounded = [t for t in join.inputs if _is_bounded(graph, t)]
        others = [t for t in join.inputs if t not in bounded and graph.tensors[t].is_float]
        if bounded and others:
            found.append(
                (
                    join.op.id,
                    f"joins {_listed(bounded)} (values between −1 and 1) and {_listed(others)} (of any range) to "
                    f"output {join.output!r} on one {spec.bits}-bit grid: if the others are much larger, nothing is "
                    f"left of {_listed(bounded)}. Give {join.op.output!r} 16 bits, or make two outputs of it",
                )
            )
    return found


def _listed(tensors: Sequence[TensorId]) -> str:
    shown = ", ".join(map(repr, tensors[:3]))
    return shown if len(tensors) <= 3 else f"{shown} and {len(tensors) - 3} more"


def _is_bounded(graph: Graph, tensor: TensorId) -> bool:
    op = graph.producer(tensor)
    while op is not None and op.kind in KEEPING and op.data_inputs:
        op = graph.producer(op.data_inputs[0])
    if op is None:
        return False
    if op.kind is OpKind.CONCAT:
        return all(_is_bounded(graph, t) for t in op.data_inputs)
    if op.kind is OpKind.CLIPPED_RELU and isinstance(op.attrs, ActivationAttrs):
        return op.attrs.maximum is not None and op.attrs.maximum <= 1
    return op.type in BOUNDED
