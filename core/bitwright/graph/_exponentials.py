"""Quotients and logarithms of sums of exponentials: softmax and all that is made as it is, written out.

    softmax = eˣ / Σeˣ    log-softmax = x − log Σeˣ    log Σeˣ    sigmoid = 1 / (1 + e⁻ˣ)    softplus = log(1 + eˣ)

each with or without the maximum subtracted; and ELU, which takes eˣ − 1 where x < 0 and x elsewhere. Exponentials of
numbers that lie d apart differ by the factor e^d: on a grid for the largest, those of numbers lower by 12 are less than
half a step of 16 bits (by 6.3, of 8 bits). What the quotient, the logarithm or the choice makes of them needs them all:
inside there is no useful grid, as there is none inside norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bitwright.graph._composite import Composite, behind, closed, constant_operand, is_mean, producer, transparent
from bitwright.graph._graph import Graph, Op, OpKind, TensorId

_EXPONENTIALS = frozenset({"Exp", "Exp2", "Expm1"})
LOGARITHMS = frozenset({"Log", "Log1p", "Log2", "Log10"})
_LINEAR = frozenset({"Div", "Max", "Clip", "Relu"})
"""What, with constants, makes a sum of exponentials of one."""
_BOUNDED = frozenset({"Add", "Max", "Clip"})
"""What, with constants, keeps a probability from zero before its logarithm is taken."""


def exponentials(graph: Graph) -> Iterator[Composite]:
    """Each as far as it goes: log-softmax and an exponential are a softmax, softmax and a logarithm a log-softmax.

    The type is "Softmax", "LogSoftmax", "ReduceLogSumExp" (softplus too), "Elu" or, of other quotients, "Exponentials".
    """
    sums = _Sums(graph)
    for op in graph:
        # What is after it, or the maximum that is subtracted before, may be read outside: the largest that is closed.
        for region in (r for shifted in (True, False) for r in _regions(graph, sums, op, shifted)):
            found = closed(graph, region.type, list(region.ops), region.end, region.source)
            if found is not None:
                yield found
                break


@dataclass(frozen=True)
class Softmax:
    """A softmax, log-softmax or hardmax (`type`): the scores that it compares, and what it makes of them."""

    type: str
    scores: TensorId
    result: TensorId


def softmaxes(graph: Graph) -> Iterator[Softmax]:
    """Every one, in the order of the graph, an op or written out, whoever else reads its inner tensors."""
    sums = _Sums(graph)
    for op in graph:
        if op.kind is OpKind.SOFTMAX and op.data_inputs:
            yield Softmax(op.type, op.data_inputs[0], op.output)
        for region in _regions(graph, sums, op, shifted=True):
            if region.type in ("Softmax", "LogSoftmax"):
                yield Softmax(region.type, region.source, region.end.output)


@dataclass(frozen=True)
class _Region:
    """Ops that compute a `type` of `source`, up to `end`. One that is `alone` is an op already."""

    type: str
    ops: tuple[Op, ...]
    end: Op
    source: TensorId
    alone: bool = False


class _Sums:
    """The tensors of a graph that are linear functions of exponentials, with constants, casts and weights.

    Attributes:
        exponentials: one of them for each such tensor.
        added: those tensors that are more than multiples of one exponential.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.exponentials: dict[TensorId, Op] = {}
        self.added: set[TensorId] = set()
        for op in graph:
            parts = [t for t in op.data_inputs if t in self.exponentials]
            if op.kind is OpKind.OPAQUE or not (op.type in _EXPONENTIALS or self._linear(op, parts)):
                continue
            self.exponentials[op.output] = op if op.type in _EXPONENTIALS else self.exponentials[parts[0]]
            if op.type in ("Add", "Sub", "ReduceSum") or is_mean(op) or not self.added.isdisjoint(parts):
                self.added.add(op.output)

    def _linear(self, op: Op, parts: list[TensorId]) -> bool:
        if not parts:
            return False
        if op.type in ("Add", "Sub"):
            return len(parts) == len(op.data_inputs)
        if op.type in ("Mul", "Where"):  # a mask, or a weight for each
            return True
        if op.type == "ReduceSum" or is_mean(op) or transparent(self.graph, op):  # axes or a shape beside it perhaps
            return op.data_inputs[0] == parts[0]
        return constant_operand(op) and op.type in _LINEAR

    def below(self, tensor: TensorId, shifted: bool) -> list[Op]:
        """The ops of such a tensor, from the exponentials on; `shifted`: from what is subtracted before."""
        ops: dict[TensorId, Op] = {}
        queue = [tensor]
        for t in queue:
            op = self.graph.producer(t)
            if op is None or t not in self.exponentials or t in ops:
                continue
            ops[t] = op
            if op.type not in _EXPONENTIALS:
                queue += op.data_inputs
            elif shifted:
                ops |= {o.output: o for o in self._argument(op)[1]}
        return list(ops.values())

    def source(self, tensor: TensorId, shifted: bool) -> TensorId:
        """What the exponentials are of."""
        exponential = self.exponentials[tensor]
        return self._argument(exponential)[0] if shifted else exponential.data_inputs[0]

    def _argument(self, exponential: Op) -> tuple[TensorId, list[Op]]:
        """x, and the ops of x − max x, multiplied perhaps; the argument itself if it is something else."""
        tensor = exponential.data_inputs[0]
        op, passed = producer(self.graph, tensor)
        ops = list(passed)
        while op is not None and op.type in ("Mul", "Div") and constant_operand(op):
            ops.append(op)
            op, passed = producer(self.graph, op.data_inputs[0])
            ops += passed
        if op is not None and op.type == "Sub" and len(op.data_inputs) == 2:
            x = behind(self.graph, op.data_inputs[0])[0]
            top, moves = producer(self.graph, op.data_inputs[1])
            if top is not None and _maximum(self.graph, top) == x:
                return x, [*ops, op, *moves, top]
        return tensor, []


def _maximum(graph: Graph, op: Op) -> TensorId | None:
    """What an op takes the largest values of."""
    return behind(graph, op.data_inputs[0])[0] if op.type == "ReduceMax" else None


def _regions(graph: Graph, sums: _Sums, op: Op, shifted: bool) -> list[_Region]:
    """What an op is the core of, the largest first."""
    region = _core(graph, sums, op, shifted)
    found: list[_Region] = []
    while region is not None:
        found += [] if region.alone else [region]
        region = _further(graph, region)
    return found[::-1]


def _core(graph: Graph, sums: _Sums, op: Op, shifted: bool) -> _Region | None:
    inputs = op.data_inputs
    if op.kind is OpKind.OPAQUE or not inputs:
        return None
    if op.type in ("Softmax", "LogSoftmax", "Sigmoid", "ReduceLogSumExp"):
        return _Region("Exponentials" if op.type == "Sigmoid" else op.type, (op,), op, inputs[0], alone=True)
    if op.type == "Where":
        return _elu(graph, sums, op)
    type, part, whole, between = "Exponentials", "", "", list[Op]()
    if op.type in LOGARITHMS:
        type, whole = "ReduceLogSumExp", inputs[0]
    elif _inverse(op):
        whole = inputs[0]
    elif op.type == "Div" and len(inputs) == 2:
        part, whole = inputs
    elif op.type == "Mul" and len(inputs) == 2:
        for factor, other in (inputs, inputs[::-1]):
            inverse, casts = producer(graph, other)
            if inverse is not None and _inverse(inverse) and inverse.data_inputs[0] in sums.added:
                part, whole, between = factor, inverse.data_inputs[0], [inverse, *casts]
                break
    if whole not in sums.added and not (op.type == "Log1p" and whole in sums.exponentials):
        return None
    if part and behind(graph, part)[0] == _summed(graph, whole):
        type = "Softmax"
    ops = (op, *between, *sums.below(whole, shifted), *sums.below(part, shifted))
    return _Region(type, ops, op, sums.source(whole, shifted))


def _elu(graph: Graph, sums: _Sums, op: Op) -> _Region | None:
    chosen = next((t for t in op.data_inputs if t in sums.exponentials), None)
    source = "" if chosen is None else sums.source(chosen, shifted=False)
    if chosen is None or behind(graph, source)[0] not in {behind(graph, t)[0] for t in op.data_inputs}:
        return None
    return _Region("Elu", (op, *sums.below(chosen, shifted=False)), op, source)


def _inverse(op: Op) -> bool:
    """c / x. Which operand a constant is, the graph doesn't say: x / c is taken for one too, and does no harm."""
    return op.type == "Reciprocal" or (op.type == "Div" and constant_operand(op))


def _summed(graph: Graph, tensor: TensorId) -> TensorId | None:
    """What a tensor sums over an axis, an ε perhaps added."""
    op = graph.producer(tensor)
    while op is not None and (transparent(graph, op) or (op.type in _BOUNDED and constant_operand(op))):
        op = graph.producer(op.data_inputs[0])
    return behind(graph, op.data_inputs[0])[0] if op is not None and op.type == "ReduceSum" else None


def _further(graph: Graph, region: _Region) -> _Region | None:
    """The region with the next op that belongs to it."""
    passed: list[Op] = []
    probability = region.type in ("Softmax", "Exponentials")
    tensor, op = region.end.output, graph.sole_consumer(region.end.output)
    while op is not None and (transparent(graph, op) or (probability and op.type in _BOUNDED and constant_operand(op))):
        passed.append(op)
        tensor, op = op.output, graph.sole_consumer(op.output)
    if op is None:
        return None
    ops, source = (*region.ops, *passed, op), region.source
    if probability:
        logarithm = "LogSoftmax" if region.type == "Softmax" else "Exponentials"
        return _Region(logarithm, ops, op, source) if op.type in LOGARITHMS else None
    if region.type == "LogSoftmax":
        return _Region("Softmax", ops, op, source) if op.type == "Exp" else None
    if op.type not in ("Add", "Sub") or len(op.data_inputs) != 2:
        return None
    other = next((t for t in op.data_inputs if t != tensor), tensor)
    if op.type == "Add":  # the maximum, again
        top, moves = producer(graph, other)
        if top is not None and _maximum(graph, top) == source:
            return _Region(region.type, (*ops, *moves, top), op, source)
    elif op.data_inputs[1] == tensor:
        arguments = {behind(graph, o.data_inputs[0])[0] for o in region.ops if o.type in _EXPONENTIALS}
        if behind(graph, other)[0] in {behind(graph, source)[0], *arguments}:
            return _Region("LogSoftmax", ops, op, source)
    return None
