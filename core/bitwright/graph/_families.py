"""Families of networks by their structure, never by names: transformers, and what their tensors are there for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from bitwright.graph._composites import COMPOSITES
from bitwright.graph._exponentials import softmaxes
from bitwright.graph._graph import LINEAR_KINDS, Graph, Op, OpId, OpKind, TensorId
from bitwright.graph._op_types import preserves_grid


class Place(StrEnum):
    """What a tensor of a transformer is."""

    EMBEDDING = "embedding"
    SUM = "residual sum"
    NORM = "norm"
    HIDDEN = "input of a projection"  # the product of a gated MLP, or its activation
    PROJECTION = "addend of a residual sum"
    LOGITS = "logits"


class TransformerKind(StrEnum):
    """How a transformer is built."""

    DECODER = "decoder"  # pre-norm, logits over the vocabulary that it embeds
    ENCODER = "encoder"  # pre-norm
    POST_NORM = "post-norm encoder"  # norms behind the sums, as in BERT
    VISION = "vision transformer"  # a stream that begins with patches


@dataclass(frozen=True)
class Transformer:
    """A transformer.

    Attributes:
        kind: how it is built.
        attentions: how many there are.
        places: what its tensors are, where errors relative to each token are what reaches the outputs: each of them is
            normalized, or multiplied with weights, token by token. Inner tensors of attentions aren't among them.
    """

    kind: TransformerKind
    attentions: int
    places: Mapping[TensorId, Place]


def transformer(graph: Graph) -> Transformer | None:
    """What transformer a network is: attentions, and norms that read sums of two branches; None if it is none."""
    attentions = sum(op.type == "Attention" for op in graph)
    attentions += sum(_mixes(graph, s.result) for s in softmaxes(graph))
    norms = dict(_norms(graph))
    if not attentions or not norms:
        return None
    stream = _Stream(graph, norms)
    if not stream.sums:
        return None
    places = {**stream.places, **dict.fromkeys(norms, Place.NORM)}
    widths: set[int | None] = set()
    for output in graph.outputs:
        root = _behind(graph, output)
        if root not in places and _written(graph, root):
            places[root] = Place.LOGITS
            widths.add((graph.tensors[output].shape or (None,))[-1])
    if stream.skips > len(stream.sums) / 2:
        kind = TransformerKind.POST_NORM
    elif not stream.vocabularies:
        kind = TransformerKind.VISION if stream.patches else TransformerKind.ENCODER
    else:
        kind = TransformerKind.DECODER if stream.vocabularies & widths else TransformerKind.ENCODER
    return Transformer(kind, attentions, places)


class _Stream:
    """What the norms read, followed back to where it begins, and forward to the last sum.

    Attributes:
        places: its tensors, and the hidden ones before projections into it.
        sums: additions of two branches.
        skips: how many of their operands are the output of a norm.
        patches: convolutions that write to it.
        vocabularies: rows of the embeddings that write to it.
    """

    def __init__(self, graph: Graph, norms: Mapping[TensorId, TensorId]) -> None:
        self.graph, self.norms = graph, norms
        self.places: dict[TensorId, Place] = {}
        self.sums: set[OpId] = set()
        self.skips = self.patches = 0
        self.vocabularies: set[int] = set()
        self._inside = {op.id for name in _NORMS for c in COMPOSITES[name](graph) for op in c.ops}
        self._seen: set[TensorId] = set()
        self._queue = list(norms.values())
        while self._queue:
            self._visit(_behind(graph, self._queue.pop()))

    def _visit(self, tensor: TensorId) -> None:
        op = self.graph.producer(tensor)
        if tensor in self._seen or op is None or op.id in self._inside or tensor in self.norms:
            return
        self._seen.add(tensor)
        if parts := _written(self.graph, tensor):
            self._begin(parts)
        elif op.kind is OpKind.CONCAT:
            self._queue += op.data_inputs
            self.places[tensor] = Place.EMBEDDING
        elif op.kind in (OpKind.ADD, OpKind.MUL) and (op.kind is OpKind.ADD or len(op.data_inputs) == 1):
            self.places[tensor] = Place.SUM
            self._queue += op.data_inputs
            if _joins(op):
                self.sums.add(op.id)
                self.skips += sum(_behind(self.graph, t) in self.norms for t in op.data_inputs)
            readers = [u for t in _ahead(self.graph, tensor) for u in self.graph.consumers(t)]
            self._queue += [u.output for u in readers if _joins(u)]

    def _begin(self, parts: list[TensorId]) -> None:
        """A projection into the stream, or an embedding, down from the constants that are added to it."""
        op = self.graph.producer(parts[-1])
        assert op is not None
        embedded = op.kind is OpKind.EMBEDDING
        self.places |= dict.fromkeys(parts, Place.EMBEDDING if embedded else Place.PROJECTION)
        if embedded and op.weight is not None:
            self.vocabularies.add(self.graph.params[op.weight].shape[0])
        self.patches += op.kind is OpKind.CONV
        if op.kind is OpKind.LINEAR and (hidden := _hidden(self.graph, op)) is not None:
            self.places[hidden] = Place.HIDDEN


_NORMS = ("LayerNormalization", "RMSNormalization")
_TYPES = frozenset({*_NORMS, "SimplifiedLayerNormalization"})


def _norms(graph: Graph) -> Iterator[tuple[TensorId, TensorId]]:
    """(output, what it reads) of each norm over tokens, written out or one op."""
    for name in _NORMS:
        for composite in COMPOSITES[name](graph):
            yield composite.output.output, composite.source
    for op in graph:
        if op.type in _TYPES and op.data_inputs:
            yield op.output, op.data_inputs[0]


def _mixes(graph: Graph, weights: TensorId) -> bool:
    """Whether what a softmax gives is multiplied with another activation, as attention does."""
    return any(
        user.kind is OpKind.MATMUL and len(user.data_inputs) == 2
        for t in _ahead(graph, weights)
        for user in graph.consumers(t)
    )


def _joins(op: Op) -> bool:
    return op.kind is OpKind.ADD and len(op.data_inputs) == 2 and op.data_inputs[0] != op.data_inputs[1]


def _behind(graph: Graph, tensor: TensorId) -> TensorId:
    """What a tensor is but for its form; parts of it that are joined again, as in rolled windows, are itself."""
    while (op := graph.producer(tensor)) is not None and op.data_inputs:
        joined = op.kind is OpKind.CONCAT and len(op.data_inputs) > 1
        if not preserves_grid(op) and not (joined and len({_behind(graph, t) for t in op.data_inputs}) == 1):
            break
        tensor = op.data_inputs[0]
    return tensor


def _ahead(graph: Graph, tensor: TensorId) -> list[TensorId]:
    """A tensor and what it becomes by changes of form alone."""
    found = [tensor]
    for t in found:
        found += [o for u in graph.consumers(t) if preserves_grid(u) and u.data_inputs[0] == t for o in u.outputs]
    return found


def _written(graph: Graph, tensor: TensorId) -> list[TensorId]:
    """A tensor and those behind constants that are added or multiplied, down to the linear op or embedding that makes
    it; empty where another op does."""
    way = [tensor]
    while (op := graph.producer(way[-1])) is not None:
        if op.kind is OpKind.EMBEDDING or op.kind in LINEAR_KINDS:
            return way
        if op.kind not in (OpKind.ADD, OpKind.MUL) or len(op.data_inputs) != 1:
            return []
        way.append(_behind(graph, op.data_inputs[0]))
    return []


def _hidden(graph: Graph, projection: Op) -> TensorId | None:
    """The product or activation that a linear op reads."""
    tensor = _behind(graph, projection.data_inputs[0])
    op = graph.producer(tensor)
    activated = op is not None and op.kind in (OpKind.MUL, OpKind.ACTIVATION, OpKind.RELU)
    return tensor if activated else None
