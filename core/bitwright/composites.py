"""Composite patterns: normalizations and biased products that a model spells out in elementary ONNX ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bitwright.graph import Graph, Op, OpId, OpKind, ParamRole, TensorId


@dataclass(frozen=True)
class Composite:
    """A pattern that the target computes as one op.

    Attributes:
        type: the ONNX type that it amounts to.
        ops: every op of it, topologically sorted.
        source: the tensor that it reads.
        gamma, beta: the ops that apply scale and shift, if any.
    """

    type: str
    ops: tuple[Op, ...]
    source: TensorId
    gamma: Op | None = None
    beta: Op | None = None

    @property
    def output(self) -> Op:
        """The op that computes the result."""
        return self.ops[-1]

    @property
    def inner(self) -> tuple[TensorId, ...]:
        """Tensors that exist only inside."""
        return tuple(t for op in self.ops[:-1] for t in op.outputs)


def layer_normalizations(graph: Graph) -> Iterator[Composite]:
    """(x − mean(x)) / √(mean((x − mean(x))²) + ε) [· γ] [+ β]."""
    for end in graph:
        for numerator, variance, ops in _normalized(graph, end):
            difference = graph.producer(numerator)
            source = None if difference is None else _centred(graph, difference)
            if source is None or difference is None:
                continue
            inner = [difference, *_producers(graph, difference.data_inputs[1:])]
            other = graph.producer(variance)
            if variance != numerator:  # some exporters write x − mean(x) twice
                if other is None or _centred(graph, other) != source:
                    continue
                inner += [other, *_producers(graph, other.data_inputs[1:])]
            found = _finish(graph, "LayerNormalization", [*ops, *inner], end, source)
            if found is not None:
                yield found
                break


def rms_normalizations(graph: Graph) -> Iterator[Composite]:
    """x / √(mean(x²) + ε) [· γ]; the inner part of a layer normalization doesn't count."""
    for end in graph:
        for numerator, squared, ops in _normalized(graph, end):
            producer = graph.producer(numerator)
            if squared != numerator or (producer is not None and _centred(graph, producer) is not None):
                continue
            found = _finish(graph, "RMSNormalization", ops, end, numerator)
            if found is not None:
                yield found
                break


def matmul_adds(graph: Graph) -> Iterator[Composite]:
    """x · W + b, written as a MatMul with a constant and an Add of a constant."""
    for op in graph:
        if op.kind is not OpKind.LINEAR or op.type != "MatMul" or ParamRole.BIAS in op.params:
            continue
        add = graph.sole_consumer(op.output)
        if add is not None and add.kind is OpKind.ADD and _constant_operand(add):
            yield Composite("MatmulAdd", (op, add), op.data_inputs[0], beta=add)


COMPOSITES: Mapping[str, Callable[[Graph], Iterator[Composite]]] = {
    "LayerNormalization": layer_normalizations,
    "RMSNormalization": rms_normalizations,
    "MatmulAdd": matmul_adds,
}
"""Recognizers by the name that `supergroup_pass_list` gives them."""


def _normalized(graph: Graph, end: Op) -> Iterator[tuple[TensorId, TensorId, list[Op]]]:
    """Readings of `end` as a / √(mean(b²) + ε): (a, b, the ops from the square to `end`)."""
    for numerator, ops in _divided(graph, end):
        root = ops[-1]
        shifted = graph.producer(root.data_inputs[0])
        if shifted is None or shifted.type != "Add" or not _constant_operand(shifted):
            continue
        mean = graph.producer(shifted.data_inputs[0])
        if mean is None or mean.type != "ReduceMean":
            continue
        square = graph.producer(mean.data_inputs[0])
        if square is not None and (base := _squared(square)) is not None:
            yield numerator, base, [*ops, shifted, mean, square]


def _divided(graph: Graph, end: Op) -> Iterator[tuple[TensorId, list[Op]]]:
    """Readings of `end` as a / √v, written with Div, Reciprocal or a negative power; the root comes last."""
    if end.type == "Div" and len(end.data_inputs) == 2:
        root = graph.producer(end.data_inputs[1])
        if root is not None and _is_root(root):
            yield end.data_inputs[0], [end, root]
    if end.type == "Mul" and len(end.data_inputs) == 2:
        for a, b in (end.data_inputs, end.data_inputs[::-1]):
            inverse = graph.producer(b)
            if inverse is None:
                continue
            if inverse.type == "Pow" and _constant_operand(inverse):
                yield a, [end, inverse]
            elif inverse.type == "Reciprocal" or (inverse.type == "Div" and _constant_operand(inverse)):
                root = graph.producer(inverse.data_inputs[0])
                if root is not None and _is_root(root):
                    yield a, [end, inverse, root]


def _is_root(op: Op) -> bool:
    return op.type == "Sqrt" or (op.type == "Pow" and _constant_operand(op))


def _squared(op: Op) -> TensorId | None:
    if op.type == "Mul" and len(op.data_inputs) == 2 and op.data_inputs[0] == op.data_inputs[1]:
        return op.data_inputs[0]
    return op.data_inputs[0] if op.type == "Pow" and _constant_operand(op) else None


def _centred(graph: Graph, op: Op) -> TensorId | None:
    """x, if the op computes x − mean(x)."""
    if op.type != "Sub" or len(op.data_inputs) != 2:
        return None
    mean = graph.producer(op.data_inputs[1])
    source = op.data_inputs[0]
    return source if mean is not None and mean.type == "ReduceMean" and mean.data_inputs[0] == source else None


def _constant_operand(op: Op) -> bool:
    """Whether an elementwise op has one activation and, so, constants for the rest."""
    return len(op.data_inputs) == 1


def _producers(graph: Graph, tensors: tuple[TensorId, ...]) -> list[Op]:
    return [p for t in tensors if (p := graph.producer(t)) is not None]


def _finish(graph: Graph, type: str, ops: list[Op], end: Op, source: TensorId) -> Composite | None:
    """Take in a following · γ and + β, and make sure that nothing outside reads what is inside."""
    gamma = _affine(graph, end, OpKind.MUL)
    beta = _affine(graph, gamma or end, OpKind.ADD)
    members: dict[OpId, Op] = {op.id: op for op in (*ops, *(o for o in (gamma, beta) if o is not None))}
    last = beta or gamma or end
    for op in members.values():
        for tensor in op.outputs:
            outside = any(user.id not in members for user in graph.consumers(tensor))
            if op is not last and (outside or tensor in graph.outputs):
                return None
    inside = tuple(op for op in graph if op.id in members and op is not last)
    return Composite(type, (*inside, last), source, gamma, beta)


def _affine(graph: Graph, op: Op, kind: OpKind) -> Op | None:
    user = graph.sole_consumer(op.output)
    if user is not None and user.kind is kind and _constant_operand(user) and ParamRole.CONSTANT in user.params:
        return user
    return None
