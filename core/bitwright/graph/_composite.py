"""Composite patterns: ops that a target computes as one, and the walks that find them."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.graph._graph import Graph, Op, OpId, OpKind, TensorId


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


def closed(
    graph: Graph,
    type: str,
    ops: list[Op],
    last: Op,
    source: TensorId,
    gamma: Op | None = None,
    beta: Op | None = None,
) -> Composite | None:
    """The composite of these ops, if nothing outside reads what is inside."""
    members: dict[OpId, Op] = {op.id: op for op in ops}
    for op in members.values():
        for tensor in op.outputs:
            outside = any(user.id not in members for user in graph.consumers(tensor))
            if op is not last and (outside or tensor in graph.outputs):
                return None
    inside = tuple(op for op in graph if op.id in members and op is not last)
    return Composite(type, (*inside, last), source, gamma, beta)


def is_mean(op: Op) -> bool:
    """Averaging over whole axes: ReduceMean, or global pooling, which is the same."""
    return op.type in ("ReduceMean", "GlobalAveragePool")


def transparent(graph: Graph, op: Op) -> bool:
    """Whether an op changes a tensor's type or form alone."""
    if op.type == "Cast":
        return len(op.data_inputs) == 1 and all(graph.tensors[t].is_float for t in (*op.data_inputs, op.output))
    return op.kind in (OpKind.IDENTITY, OpKind.RESHAPE) and len(op.data_inputs) >= 1


def behind(graph: Graph, tensor: TensorId) -> tuple[TensorId, tuple[Op, ...]]:
    """The tensor behind casts and identities, and these, last one first."""
    passed: list[Op] = []
    while (op := graph.producer(tensor)) is not None and transparent(graph, op) and op.kind is not OpKind.RESHAPE:
        passed.append(op)
        tensor = op.data_inputs[0]
    return tensor, tuple(passed)


def producer(graph: Graph, tensor: TensorId) -> tuple[Op | None, tuple[Op, ...]]:
    """The op that computes a tensor, past casts and changes of form, and these."""
    passed: list[Op] = []
    while (op := graph.producer(tensor)) is not None and transparent(graph, op):
        passed.append(op)
        tensor = op.data_inputs[0]
    return op, tuple(passed)


def constant_operand(op: Op) -> bool:
    """Whether an elementwise op has one activation and, so, constants for the rest."""
    return len(op.data_inputs) == 1
