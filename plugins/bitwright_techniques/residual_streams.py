"""Residual streams: the tensors of one width that a transformer's blocks read through norms and add to.

A stream can be expressed in another orthonormal basis if everything that touches it is known: embeddings, linear ops
and constants write to it, additions join it, and linear ops read it, directly or through a norm over its channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from bitwright.graph import (
    COMPOSITES,
    Composite,
    Graph,
    Op,
    OpId,
    OpKind,
    ParamRole,
    PoolAttrs,
    TensorId,
)

_LAYER = frozenset({"LayerNormalization"})
_NORMS = _LAYER | {"RMSNormalization", "SimplifiedLayerNormalization"}
"""An Lp norm commutes with rotations only for p = 2 and over the last axis: it reads a stream as any other op does."""


@dataclass(frozen=True)
class StreamNorm:
    """A norm that reads a stream, and the linear ops that read what it makes.

    Attributes:
        name: the op that computes its result.
        gain, shift: (op, role) of its γ and β, if it has them.
        centred: it subtracts the mean, as layer normalization does.
        readers: every op that reads it.
    """

    name: OpId
    gain: tuple[Op, ParamRole] | None
    shift: tuple[Op, ParamRole] | None
    centred: bool
    readers: tuple[Op, ...]


@dataclass
class Stream:
    """One stream.

    Attributes:
        width: channels, the last axis of its tensors.
        tensors: that hold it, before norms.
        writers: embeddings and linear ops that compute a part of it.
        constants: additions of a constant.
        readers: linear ops that read it without a norm.
        norms: that read it.
        obstacle: why its basis can't be changed; "" if it can.
    """

    width: int
    tensors: set[TensorId] = field(default_factory=set)
    writers: dict[OpId, Op] = field(default_factory=dict)
    constants: dict[OpId, Op] = field(default_factory=dict)
    readers: dict[OpId, Op] = field(default_factory=dict)
    norms: dict[OpId, StreamNorm] = field(default_factory=dict)
    obstacle: str = ""

    @property
    def name(self) -> str:
        """Of its first writer, or first norm."""
        return next(iter(self.writers), next(iter(self.norms)))


def residual_streams(graph: Graph) -> Iterator[Stream]:
    """Every stream that a norm reads and an addition joins, in topological order."""
    composites = [c for name in ("LayerNormalization", "RMSNormalization") for c in COMPOSITES[name](graph)]
    inside = {op.id: c for c in composites for op in c.ops}
    seen: set[TensorId] = set()
    for op in graph:
        source = op.data_inputs[0] if op.type in _NORMS and op.id not in inside and op.data_inputs else None
        composite = inside.get(op.id)
        if composite is not None:
            source = composite.source
        if source is None or source in seen:
            continue
        stream = _Search(graph, inside, source).stream
        seen |= stream.tensors
        if stream.norms and any(_joins(graph, t) for t in stream.tensors):
            yield stream


def _joins(graph: Graph, tensor: TensorId) -> bool:
    op = graph.producer(tensor)
    return op is not None and op.kind is OpKind.ADD and len(op.data_inputs) == 2


class _Search:
    """Spreads from one tensor of a stream to all of it."""

    def __init__(self, graph: Graph, inside: dict[OpId, Composite], start: TensorId) -> None:
        self.graph, self.inside = graph, inside
        self.stream = Stream(self._width(start))
        queue = [start]
        while queue:
            tensor = queue.pop()
            if tensor in self.stream.tensors:
                continue
            self.stream.tensors.add(tensor)
            queue += [*self._behind(tensor), *self._ahead(tensor)]

    def _width(self, tensor: TensorId) -> int:
        shape = self.graph.tensors[tensor].shape
        return (shape[-1] or 0) if shape else 0

    def _blocked(self, why: str) -> list[TensorId]:
        self.stream.obstacle = self.stream.obstacle or why
        return []

    def _behind(self, tensor: TensorId) -> list[TensorId]:
        """The tensors of the stream that this one is made of."""
        op, stream = self.graph.producer(tensor), self.stream
        if self._width(tensor) != stream.width or stream.width < 2:
            return self._blocked(f"{tensor!r} isn't {stream.width} channels wide on its last axis")
        if op is None:
            return self._blocked(f"{tensor!r} is an input of the model")
        if op.kind is OpKind.IDENTITY and len(op.data_inputs) == 1:
            return [op.data_inputs[0]]
        if op.kind is OpKind.ADD and op.type == "Add" and op.id not in self.inside:
            if len(op.data_inputs) == 2:
                return list(op.data_inputs)
            constant = op.params.get(ParamRole.CONSTANT)
            shape = self.graph.params[constant].shape if constant is not None else ()
            if shape and shape[-1] == stream.width:
                stream.constants[op.id] = op
                return list(op.data_inputs)
            return self._blocked(f"{op.id!r} adds one number to all channels")
        weight = None if op.weight is None else self.graph.params[op.weight].shape
        axis = {OpKind.LINEAR: 0, OpKind.EMBEDDING: 1}.get(op.kind)
        if weight is not None and len(weight) == 2 and axis is not None and weight[axis] == stream.width:
            stream.writers[op.id] = op
            return []
        return self._blocked(f"{op.id!r} ({op.type}) writes to it")

    def _ahead(self, tensor: TensorId) -> list[TensorId]:
        """The tensors of the stream that are made of this one."""
        if tensor in self.graph.outputs:
            return self._blocked(f"{tensor!r} is an output of the model")
        found: list[TensorId] = []
        for op in self.graph.consumers(tensor):
            norm = self.inside.get(op.id)
            if norm is not None and norm.source == self._root(tensor):
                self._norm(norm.output, norm)
            elif op.type in _NORMS and norm is None:
                self._norm(op, None)
            elif op.kind is OpKind.IDENTITY or (op.kind is OpKind.ADD and op.type == "Add" and norm is None):
                found.append(op.output)
            elif self._reads(op, tensor):
                self.stream.readers[op.id] = op
            else:
                self._blocked(f"{op.id!r} ({op.type}) reads it")
        return found

    def _root(self, tensor: TensorId) -> TensorId:
        """What a tensor is, behind casts and identities."""
        while (op := self.graph.producer(tensor)) is not None and op.kind is OpKind.IDENTITY and op.data_inputs:
            tensor = op.data_inputs[0]
        return tensor

    def _reads(self, op: Op, tensor: TensorId) -> bool:
        shape = None if op.weight is None else self.graph.params[op.weight].shape
        return (
            op.kind is OpKind.LINEAR
            and op.data_inputs == (tensor,)
            and shape is not None
            and len(shape) == 2
            and shape[1] == self.stream.width
        )

    def _norm(self, op: Op, composite: Composite | None) -> None:
        if op.id in self.stream.norms:
            return
        readers: dict[OpId, Op] = {}
        queue = [op.output]
        while queue:
            tensor = queue.pop()
            if tensor in self.graph.outputs:
                self._blocked(f"the norm {op.id!r} is an output of the model")
            for user in self.graph.consumers(tensor):
                if user.kind is OpKind.IDENTITY:
                    queue.append(user.output)
                elif self._reads(user, tensor):
                    readers[user.id] = user
                else:
                    self._blocked(f"{user.id!r} ({user.type}) reads the norm {op.id!r}")
        gain, shift = _affine(op, composite)
        if composite is None:
            type, whole = (
                op.type,
                all(
                    self.graph.params[o.params[role]].shape == (self.stream.width,)
                    for o, role in (x for x in (gain, shift) if x is not None)
                ),
            )
        else:
            type = composite.type
            means = [o.attrs.axes for o in composite.ops if isinstance(o.attrs, PoolAttrs)]
            rank = len(self.graph.tensors[composite.source].shape or ())
            whole = bool(means) and all(axes in ((rank - 1,), (-1,)) for axes in means)
        if not whole or len(op.outputs) != 1:
            self._blocked(f"the norm {op.id!r} isn't one over the last axis")
        self.stream.norms[op.id] = StreamNorm(op.id, gain, shift, type in _LAYER, tuple(readers.values()))


def _affine(op: Op, composite: Composite | None) -> tuple[tuple[Op, ParamRole] | None, tuple[Op, ParamRole] | None]:
    """(op, role) of γ and of β."""
    if composite is not None:
        parts = (composite.gamma, composite.beta)
        gain, shift = ((o, ParamRole.CONSTANT) if o is not None else None for o in parts)
        return gain, shift
    gain, shift = ((op, r) if r in op.params else None for r in (ParamRole.GAMMA, ParamRole.BETA))
    return gain, shift
