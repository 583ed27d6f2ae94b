"""Matchers that compose: tests of one op, linear chains of ops, and walks through transparent ops.

    act = kind(OpKind.RELU, OpKind.CLIPPED_RELU)
    pair = chain(linear.named("first"), optional(act.named("act")), linear.named("second"))
    for match in pair.find(graph):
        match["first"], match.get("act"), match["second"]

Matchers are values: build them once at module level and use them on any graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from bitwright.graph._graph import LINEAR_KINDS, ConvAttrs, Graph, Op, OpKind, ParamRole, TensorId

Predicate = Callable[[Graph, Op], bool]


@dataclass(frozen=True)
class OpMatcher:
    """A test of one op. Combine with ``|``, ``&`` and ``~``.

    Attributes:
        test: the predicate.
        label: how messages and `repr` show it.
        name: key of the op in a chain's match; empty for "not needed by name".
        skippable: in a chain, the element may be missing.
    """

    test: Predicate
    label: str = "op"
    name: str = ""
    skippable: bool = False

    def __call__(self, graph: Graph, op: Op) -> bool:
        """Whether the op passes."""
        return self.test(graph, op)

    def __or__(self, other: OpMatcher) -> OpMatcher:
        return OpMatcher(lambda g, o: self.test(g, o) or other.test(g, o), f"({self.label} | {other.label})")

    def __and__(self, other: OpMatcher) -> OpMatcher:
        return OpMatcher(lambda g, o: self.test(g, o) and other.test(g, o), f"({self.label} & {other.label})")

    def __invert__(self) -> OpMatcher:
        return OpMatcher(lambda g, o: not self.test(g, o), f"~{self.label}")

    def named(self, name: str) -> OpMatcher:
        """The same test, its op kept under `name`."""
        return replace(self, name=name)

    def find(self, graph: Graph) -> Iterator[Op]:
        """Every op that passes, in topological order."""
        return (op for op in graph if self.test(graph, op))

    def __repr__(self) -> str:
        return self.label


def kind(*kinds: OpKind) -> OpMatcher:
    """Ops of any of these kinds."""
    wanted = frozenset(kinds)
    return OpMatcher(lambda _, op: op.kind in wanted, " | ".join(k.value for k in kinds))


def op_type(*types: str) -> OpMatcher:
    """Ops of any of these ONNX types. A type that the backend can't name (`OPAQUE`) never matches."""
    wanted = frozenset(types)
    return OpMatcher(lambda _, op: op.type in wanted and op.kind is not OpKind.OPAQUE, " | ".join(types))


def where(predicate: Predicate, label: str = "op") -> OpMatcher:
    """Ops that pass any predicate of (graph, op)."""
    return OpMatcher(predicate, label)


def optional(matcher: OpMatcher) -> OpMatcher:
    """A chain's element that may be missing; it is taken where it fits and the rest still matches."""
    return replace(matcher, skippable=True)


linear = where(lambda _, op: op.kind in LINEAR_KINDS and op.weight is not None, "linear")
"""Convolutions, transposed convolutions and linear ops that have a weight."""
identity = kind(OpKind.IDENTITY)
"""Ops that pass their input on unchanged."""
nothing = where(lambda _, op: False, "nothing")


@dataclass(frozen=True)
class Match(Mapping[str, Op]):
    """Ops by name, in a chain that was found.

    Attributes:
        ops: the matched ops in order; transparent ones between them are in `path` only.
        path: all ops from first to last.
        names: name → op.
    """

    ops: tuple[Op, ...]
    path: tuple[Op, ...]
    names: Mapping[str, Op] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Op:
        return self.names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def inner(self) -> tuple[TensorId, ...]:
        """Tensors between the first op and the last: nothing outside the chain reads them."""
        return tuple(op.output for op in self.path[:-1])

    @property
    def output(self) -> TensorId:
        """What the last op computes."""
        return self.ops[-1].output


@dataclass(frozen=True)
class Chain:
    """A linear chain: each op's one output is read by the next op, once, and by nothing else. Combine with ``|``."""

    alternatives: tuple[tuple[OpMatcher, ...], ...]
    through: OpMatcher = identity

    def __or__(self, other: Chain) -> Chain:
        return replace(self, alternatives=self.alternatives + other.alternatives)

    def at(self, graph: Graph, first: Op) -> Match | None:
        """The chain that starts at `first`; the first alternative that fits wins."""
        for elements in self.alternatives:
            for taken, path in _extend(graph, elements, first, self.through, ()):
                names = {m.name: op for m, op in taken if m.name}
                return Match(tuple(op for _, op in taken), path, names)
        return None

    def find(self, graph: Graph) -> Iterator[Match]:
        """Every match, by first op in topological order; matches may overlap."""
        return (m for op in graph if (m := self.at(graph, op)) is not None)


def chain(*elements: OpMatcher, through: OpMatcher = identity) -> Chain:
    """A linear chain of ops.

    Args:
        elements: tests of successive ops; `optional` ones may be missing, but for the first.
        through: ops that may lie between two elements and are passed over.

    Raises:
        ValueError: no elements, or the first is optional.
    """
    if not elements or elements[0].skippable:
        raise ValueError("a chain needs elements, and its first can't be optional")
    return Chain((elements,), through)


def successor(graph: Graph, op: Op) -> Op | None:
    """The one op that reads all that `op` computes, once; None where the flow branches, ends or leaves the model."""
    if any(graph.consumers(t) or t in graph.outputs for t in op.outputs[1:]):
        return None
    user = graph.sole_consumer(op.output)
    return user if user is not None and user.data_inputs.count(op.output) == 1 else None


def downstream(graph: Graph, op: Op, through: OpMatcher = identity) -> Op | None:
    """Walk forward along `successor`, past ops that `through` accepts."""
    following = successor(graph, op)
    while following is not None and through(graph, following):
        following = successor(graph, following)
    return following


def upstream(graph: Graph, tensor: TensorId, through: OpMatcher = identity, *, linear: bool = True) -> Op | None:
    """Walk back from a tensor to the op that computes it, past ops that `through` accepts.

    Args:
        graph: the graph.
        tensor: where to start.
        through: ops that are passed over, by their first input.
        linear: stop (None) where a tensor on the way has other readers or is a model output.
    """
    while True:
        producer = graph.producer(tensor)
        if producer is None or (linear and graph.sole_consumer(tensor) is None):
            return None
        if not through(graph, producer):
            return producer
        tensor = producer.data_inputs[0]


def _extend(
    graph: Graph, elements: tuple[OpMatcher, ...], op: Op | None, through: OpMatcher, path: tuple[Op, ...]
) -> Iterator[tuple[tuple[tuple[OpMatcher, Op], ...], tuple[Op, ...]]]:
    """All ways to match `elements` from `op` on, those that take optional elements first."""
    if not elements:
        yield (), path
        return
    head, rest = elements[0], elements[1:]
    if op is not None and len(op.outputs) > 0:
        if head(graph, op):
            following = successor(graph, op) if rest else None
            for taken, full in _extend(graph, rest, following, through, (*path, op)):
                yield ((head, op), *taken), full
        elif path and through(graph, op):
            yield from _extend(graph, elements, successor(graph, op), through, (*path, op))
            return
    if head.skippable:
        # A trailing path of transparent ops belongs to the chain only if an element follows.
        yield from _extend(graph, rest, op, through, path)


@dataclass(frozen=True)
class BatchNormFold:
    """A batch norm that a neighbouring linear op can absorb.

    Attributes:
        batch_norm: the batch norm.
        into: the op that absorbs it.
        direction: "backward" into the op before, or "forward" into the op after.
    """

    batch_norm: Op
    into: Op
    direction: Literal["backward", "forward"]


def batch_norm_fold(graph: Graph, op: Op) -> BatchNormFold | None:
    """How a batch norm folds: backward if the op before allows it, else forward, else not at all.

    Backward: any convolution or linear op that only the batch norm reads; a grouped transposed convolution only
    when its groups have one channel. Forward: a linear op, or an ungrouped convolution without padding (padded
    zeros would have to become −μ·γ/σ), that alone reads the batch norm. Shared weights can't fold.
    """
    if op.kind is not OpKind.BATCH_NORM or len(op.data_inputs) != 1 or not _has_statistics(op):
        return None
    before = graph.producer(op.data_inputs[0])
    if (
        before is not None
        and successor(graph, before) is op
        and _absorbs(graph, before)
        and _scales_outputs(graph, before)
    ):
        return BatchNormFold(op, before, "backward")
    after = successor(graph, op)
    if after is not None and after.data_inputs == (op.output,) and _absorbs(graph, after) and _scales_inputs(after):
        return BatchNormFold(op, after, "forward")
    return None


def _has_statistics(op: Op) -> bool:
    return {ParamRole.GAMMA, ParamRole.BETA, ParamRole.MEAN, ParamRole.VAR} <= op.params.keys()


def _absorbs(graph: Graph, op: Op) -> bool:
    mine = [op.params[r] for r in (ParamRole.WEIGHT, ParamRole.BIAS) if r in op.params]
    return op.kind in LINEAR_KINDS and op.weight is not None and all(len(graph.users(p)) == 1 for p in mine)


def _scales_outputs(graph: Graph, op: Op) -> bool:
    if op.kind is not OpKind.CONV_TRANSPOSE or not isinstance(op.attrs, ConvAttrs) or op.weight is None:
        return True
    return op.attrs.groups in (1, graph.params[op.weight].shape[0])


def _scales_inputs(op: Op) -> bool:
    if op.kind is OpKind.LINEAR:
        return True
    attrs = op.attrs
    if op.kind is not OpKind.CONV or not isinstance(attrs, ConvAttrs):
        return False
    return attrs.groups == 1 and all(pad == (0, 0) for pad in attrs.pads)
