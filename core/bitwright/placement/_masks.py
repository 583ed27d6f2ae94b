"""Which tensors are masks or masked: they hold −∞, or numbers that stand for it, and so have no integer grid.

A grid over −∞ doesn't exist, and one over −10,000 has no step left for the scores beside it. What is told apart here:

- **offsets**: zero where something counts and a huge number where it doesn't, to be added to scores: constants, and
  what is made of conditions (`(1 − m) · −10⁴`, `where(m, 0, −∞)`, `log(m)`);
- **masked** tensors: scores with an offset added, or with a huge number filled in;
- an **input** of the model that is added to what a softmax reads and does nothing else but mask: its values are only
  known when data come, so its place decides.

From `BOUNDLESS` on a number is a mask wherever it goes. Smaller ones are if a softmax, a maximum, a choice or the
model's caller reads what they mask; a constant that merely is large (a learned bias of −12, pixels times 255) isn't.
Backends translate their nodes to `NodeView`s, hidden ones and constants included, and ask `masks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.graph import LINEAR_KINDS, OpKind

BOUNDLESS = 1e30
"""Magnitudes that stand for ∞ whoever reads them."""
HUGE = 1e3
"""Magnitudes that mask where nothing but their size tells: exp(−1000) is zero in float32 and in float64's reach."""
LOST = 30.0
"""Magnitudes that mask where the form tells that they do: a softmax loses e⁻³⁰ = 10⁻¹³ beside 1."""
_PART = 2**18
"""Values of a constant that are looked at at once."""
_SAMPLED = 2**22
"""Values of a table that are looked at: it may be a network's largest weight, and one of masks shows anywhere."""
_RUNS = 16
"""Places in a large table at which rows of it are looked at."""

_READERS = frozenset({"Softmax", "LogSoftmax", "Hardmax", "ReduceLogSumExp", "ArgMax", "TopK", "Exp"})
_MAXIMA = frozenset({"ReduceMax", "ReduceMin", "MaxPool", "GlobalMaxPool"})
_LOOKUPS = frozenset({"Gather", "GatherND", "GatherElements"})
_TESTS = frozenset({"IsNaN", "IsInf", "IsFinite", "NanToNum"})
"""Who reads a tensor through these expects it to hold NaN or ∞."""
_FILLS = frozenset({"Where", "ScatterND", "ScatterElements"})
_CARRYING_KINDS = frozenset(
    {OpKind.RESHAPE, OpKind.TRANSPOSE, OpKind.SLICE, OpKind.SPLIT, OpKind.IDENTITY, OpKind.CONCAT, OpKind.PAD}
)
_CARRYING_TYPES = frozenset({"Cast", "Trilu", "Expand", "Tile", "Neg", "ConstantOfShape", "Identity", "OneHot"})
_COMBINING_KINDS = frozenset({OpKind.MATMUL, OpKind.RESIZE, OpKind.MAX_POOL})
"""What makes conditions of conditions that aren't floats from the start: of a float input it may make a signal."""
_BOUNDS = frozenset({"Max", "Min", "Clip"})
_SIGNAL_KINDS = LINEAR_KINDS | {
    OpKind.MATMUL, OpKind.EMBEDDING, OpKind.BATCH_NORM, OpKind.LAYER_NORM, OpKind.NORM, OpKind.RELU, OpKind.PRELU,
    OpKind.CLIPPED_RELU, OpKind.AVERAGE_POOL, OpKind.RECURRENT, OpKind.RESIZE,
}  # fmt: skip
"""Kinds that take a tensor for a signal, and so no mask."""

UNREAD = LINEAR_KINDS | {OpKind.MATMUL, OpKind.BATCH_NORM, OpKind.LAYER_NORM, OpKind.NORM, OpKind.RECURRENT}
"""Kinds whose constants are weights: large, and no masks, so that nobody has to look at their values."""

_NONE, _POSSIBLE, _UNEVEN, _LIKELY, _SURE = range(5)
"""How surely something is a mask. An input of the model may be one (`_POSSIBLE`), if a softmax reads what it is added
to. A constant with huge values among others (`_UNEVEN`) masks where they saturate what reads them, a softmax or
sigmoid; elsewhere it may be a codebook with an outlier. Zeros beside one huge number (`_LIKELY`) are no codebook."""


class _Rows(Protocol):
    """An array, tensor or variable, of which rows are taken by slices."""

    @property
    def shape(self) -> Sequence[Any]: ...

    def __getitem__(self, rows: slice, /) -> object: ...


@dataclass(frozen=True, slots=True)
class Extent:
    """What a constant's values say of it: the largest and smallest magnitude, whether it has one value (`scalar`)
    or just zero and another (`binary`)."""

    largest: float
    smallest: float
    scalar: bool
    binary: bool

    @classmethod
    def of(cls, values: ArrayLike) -> Extent:
        """Of an array or number; NaN counts as nothing."""
        flat = np.asarray(values).ravel(order="K")
        if flat.size == 0:
            return cls(0.0, 0.0, False, False)
        bounds = [(float(part.min()), float(part.max())) for part in _magnitudes(flat)]
        largest = max(high for _, high in bounds)
        binary = flat.size > 1 and all(bool(((p == 0) | (p == largest)).all()) for p in _magnitudes(flat))
        return cls(largest, min(low for low, _ in bounds), flat.size == 1, binary)

    @classmethod
    def of_table(cls, table: _Rows, read: Callable[[Any], ArrayLike] = np.asarray) -> Extent:
        """Of an array in which rows are looked up, by runs of rows all over it.

        Args:
            table: what has a shape and gives rows by slices: an array, tensor or variable.
            read: rows as an array, on this machine; nothing else of a table is read or copied.
        """
        rows = int(table.shape[0]) if len(table.shape) else 0
        kept = max(1, _SAMPLED // max(1, math.prod(table.shape[1:])))
        if rows <= kept:
            return cls.of(read(table))
        runs = min(kept, _RUNS)
        starts = np.linspace(0, rows - kept // runs, runs).astype(int).tolist()
        return cls.of(np.concatenate([np.asarray(read(table[at : at + kept // runs])) for at in starts]))

    @property
    def offset(self) -> int:
        """How surely an array is an offset by itself: it leaves something as it is, and takes the rest far away."""
        if self.largest >= BOUNDLESS:
            return _SURE
        if self.scalar or self.smallest >= LOST or self.largest < LOST:
            return _NONE
        return _LIKELY if self.binary else _UNEVEN if self.largest >= HUGE else _NONE

    def factor(self, least: float) -> int:
        """How surely a condition times this is an offset, or a tensor with this filled in masked."""
        return _SURE if self.largest >= BOUNDLESS else _LIKELY if self.largest >= least else _NONE


def _magnitudes(flat: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    """Of an array's parts: it may be a network's largest weight."""
    for start in range(0, flat.size, _PART):
        part = np.asarray(flat[start : start + _PART], np.float64)
        yield np.abs(np.nan_to_num(part, nan=0.0, posinf=np.inf, neginf=-np.inf))


def is_mask(values: ArrayLike) -> bool:
    """Whether a constant is a mask by itself: what it is added to is not a sum with a bias."""
    return Extent.of(values).offset > _NONE


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as this module sees it.

    Attributes:
        kind, type: as in `graph.Op`; `type` is the ONNX type.
        inputs: every operand in order, constants and hidden ones included; numbers have a name too.
        outputs: what it computes.
    """

    kind: OpKind
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Fact:
    level: int = _NONE
    masked: bool = False
    condition: bool = False  # made of inputs, integers and constants by arithmetic alone
    sources: frozenset[str] = frozenset()  # the model's float inputs that a condition is made of
    infinite: bool = False  # masks by −∞, not by a number that stands for it


def masks(
    steps: Sequence[NodeView],
    inputs: Iterable[str],
    outputs: Iterable[str],
    constants: Mapping[str, Extent],
    is_float: Callable[[str], bool],
) -> frozenset[str]:
    """Names of the tensors, and of the constants, that are masks or masked.

    Args:
        steps: every node, in topological order.
        inputs, outputs: the model's.
        constants: extents of float constants by name; of those left out nothing is known.
        is_float: whether a tensor is of a float type.
    """
    return _Search(steps, tuple(inputs), frozenset(outputs), constants, is_float).found()


class _Search:
    def __init__(
        self,
        steps: Sequence[NodeView],
        inputs: tuple[str, ...],
        outputs: frozenset[str],
        constants: Mapping[str, Extent],
        is_float: Callable[[str], bool],
    ) -> None:
        self._steps, self._outputs, self._constants, self._is_float = steps, outputs, constants, is_float
        self._facts: dict[str, _Fact] = {
            t: _Fact(condition=True, sources=frozenset({t} if is_float(t) else ())) for t in inputs
        }
        self._signals: frozenset[str] = frozenset()
        self._possible: dict[int, str] = {}
        """NodeView that adds what may be a mask given as an input → that operand."""

    def found(self) -> frozenset[str]:
        self._forward()
        self._signals = self._used_as_signals()
        self._forward()
        found = {t for t, fact in self._facts.items() if fact.level == _SURE and self._is_float(t)}
        found |= {name for name, extent in self._constants.items() if extent.largest >= BOUNDLESS}
        return frozenset(found | self._reaching() | self._guarded())

    # -- what is known of each tensor, from the inputs on

    def _forward(self) -> None:
        self._possible.clear()
        for index, step in enumerate(self._steps):
            floats = [t for t in step.outputs if self._is_float(t)]
            self._facts.update({t: _Fact(condition=True) for t in step.outputs if t not in floats})
            if floats:
                fact = self._fact(index, step)
                self._facts.update(dict.fromkeys(floats, fact))

    def _fact(self, index: int, step: NodeView) -> _Fact:
        known = [self._facts[t] for t in step.inputs if t in self._facts]
        extents = [self._constants[t] for t in step.inputs if t in self._constants]
        data = [t for t in step.inputs if t in self._facts and self._is_float(t)]
        condition, sources = self._condition(step, known)
        level = max([self._facts[t].level for t in data], default=_NONE)
        masked = any(self._facts[t].masked for t in data)
        if step.type in _FILLS:
            level = max([level, *(e.factor(LOST) if e.scalar else e.offset for e in extents)])
            # The fill stands beside another tensor's values.
            masked |= level > _NONE and any(self._facts[t].level == _NONE for t in data)
        elif step.kind is OpKind.MUL:
            if condition:
                level = max([level, *(e.factor(HUGE if sources else LOST) for e in extents)])
            level = max([level, *(_SURE for e in extents if e.largest >= BOUNDLESS)])
        elif step.kind is OpKind.ADD or step.type == "Sub":
            level = max([level, *(e.offset for e in extents)])
            masked |= level > _NONE and any(self._facts[t].level == _NONE for t in data)
            if level == _NONE and (given := self._given_mask(step, data)) is not None:
                self._possible[index] = given
                level, masked = _POSSIBLE, True
        elif step.type == "Log":
            level = _LIKELY if condition and not sources else _NONE
            masked = False
        elif step.kind in _CARRYING_KINDS or step.type in _CARRYING_TYPES:
            level = max([level, *(e.factor(HUGE) if e.scalar else e.offset for e in extents)])
        elif step.type == "Div":
            level, masked = (self._facts[data[0]].level, self._facts[data[0]].masked) if data else (_NONE, False)
        elif step.type not in _BOUNDS:
            level, masked = _NONE, False
        infinite = any(self._facts[t].infinite for t in data) or any(np.isinf(e.largest) for e in extents)
        return _Fact(level, masked, condition, sources, level > _NONE and (infinite or step.type == "Log"))

    def _condition(self, step: NodeView, known: Sequence[_Fact]) -> tuple[bool, frozenset[str]]:
        sources = frozenset[str]().union(*(f.sources for f in known))
        arithmetic = step.kind in _CARRYING_KINDS | {OpKind.ADD, OpKind.MUL, OpKind.ELEMENTWISE}
        arithmetic |= step.type in _CARRYING_TYPES | _BOUNDS | _FILLS | {"Log"}
        arithmetic |= step.kind in _COMBINING_KINDS and not sources
        condition = arithmetic and all(f.condition for f in known) and not self._looks_up_signals(step)
        return condition, sources if condition else frozenset()

    def _looks_up_signals(self, step: NodeView) -> bool:
        """Whether rows of words, positions or biases are looked up: they are conditions where the table is of flags."""
        if step.type not in _LOOKUPS or not step.inputs or step.inputs[0] in self._facts:
            return False
        table = self._constants.get(step.inputs[0])
        return table is None or not (table.binary or table.scalar)

    def _given_mask(self, step: NodeView, data: Sequence[str]) -> str | None:
        """The operand of an addition that an input of the model alone makes up, where the other is computed."""
        given = [t for t in data if self._facts[t].condition and self._facts[t].sources]
        if len(given) != 1 or len(data) != 2 or len(step.inputs) != 2:
            return None
        return given[0] if self._signals.isdisjoint(self._facts[given[0]].sources) else None

    def _used_as_signals(self) -> frozenset[str]:
        """The model's float inputs that an op takes for a signal."""
        found: set[str] = set()
        for step in self._steps:
            # The logarithm of a mask is one; what reads features behind a logarithm takes them for a signal itself.
            if step.kind in _SIGNAL_KINDS or (step.kind is OpKind.ACTIVATION and step.type not in _BOUNDS | {"Log"}):
                for t in step.inputs:
                    found |= self._facts[t].sources if t in self._facts else set()
        return frozenset(found)

    # -- whom it reaches, from the readers back

    def _reaching(self) -> set[str]:
        hit = {t for t in self._outputs if self._masks(t, _LIKELY)}
        given: set[str] = set()
        for index, step in reversed(list(enumerate(self._steps))):
            if step.type in _TESTS:
                hit.update(t for t in step.inputs if t in self._facts and self._is_float(t))
            if step.type in _READERS or step.kind is OpKind.SOFTMAX:
                hit.update(t for t in step.inputs[:1] if self._masks(t, _POSSIBLE))
                # A fused softmax is given its mask beside the scores.
                beside = [t for t in step.inputs[1:] if t in self._facts and self._is_float(t)]
                hit.update(t for t in beside if self._facts[t].level > _NONE)
                given.update(t for t in beside if self._facts[t].condition and self._facts[t].sources)
            elif step.type == "Sigmoid":
                hit.update(t for t in step.inputs[:1] if self._masks(t, _UNEVEN))
            elif step.type in _MAXIMA or step.kind is OpKind.MAX_POOL:
                hit.update(t for t in step.inputs[:1] if self._masks(t, _LIKELY))
            if not hit.isdisjoint(step.outputs) and self._passes_on(step):
                hit.update(t for t in step.inputs if t in self._facts and self._facts[t].level > _NONE)
                hit.update(t for t in step.inputs if t in self._constants and self._constants[t].offset > _NONE)
                if index in self._possible:
                    given.add(self._possible[index])
            if not given.isdisjoint(step.outputs):
                given.update(t for t in step.inputs if t in self._facts and self._facts[t].sources)
        return {t for t in hit | given if t in self._constants or self._is_float(t)}

    def _guarded(self) -> set[str]:
        """Softmaxes of scores masked by −∞ in whose place a choice may put zero: rows masked whole are NaN there."""
        zeros = {name for name, extent in self._constants.items() if extent.largest == 0}
        chosen: set[str] = set()
        for step in reversed(self._steps):
            fills = step.type in _FILLS and not zeros.isdisjoint(step.inputs)
            if fills or (self._carries(step) and not chosen.isdisjoint(step.outputs)):
                chosen.update(step.inputs)
        found: set[str] = set()
        for step in self._steps:
            scores = step.inputs[0] if step.kind is OpKind.SOFTMAX else ""
            lost = self._masks(scores, _LIKELY) and self._facts[scores].infinite
            if lost or (self._carries(step) and not found.isdisjoint(step.inputs)):
                found.update(t for t in step.outputs if t in chosen and self._is_float(t))
        return found

    @staticmethod
    def _carries(step: NodeView) -> bool:
        return step.kind in _CARRYING_KINDS or step.type in _CARRYING_TYPES

    def _masks(self, tensor: str, least: int) -> bool:
        fact = self._facts.get(tensor)
        return fact is not None and fact.masked and fact.level >= least and self._is_float(tensor)

    @staticmethod
    def _passes_on(step: NodeView) -> bool:
        """Whether an op's result is masked because an operand is (a tested tensor's own operands needn't be)."""
        arithmetic = step.kind in _CARRYING_KINDS or step.kind in (OpKind.ADD, OpKind.MUL)
        return arithmetic or step.type in _CARRYING_TYPES | _BOUNDS | _FILLS | {"Sub", "Div"}
