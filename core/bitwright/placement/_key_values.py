"""Keys and values of attention, which a decoder keeps of earlier tokens: found in the graph, whatever they are called.

Attention is a softmax between two products of activations: of queries and keys before it, of its weights and values
behind it. What is kept of keys and values is where they were computed, or put behind those of earlier tokens (a
concatenation with what a model input brings), before anything repeats or turns them for the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from bitwright.graph import Graph, Op, OpKind, ProductAttrs, Softmax, TensorId, moved_from, softmaxes

_BETWEEN = frozenset(
    {
        OpKind.ADD, OpKind.MUL, OpKind.ELEMENTWISE, OpKind.ACTIVATION, OpKind.CLIPPED_RELU, OpKind.IDENTITY,
        OpKind.RESHAPE, OpKind.TRANSPOSE, OpKind.SLICE, OpKind.PAD,
    }
)  # fmt: skip
"""What scales, masks and rearranges scores."""


@dataclass(frozen=True)
class Kept:
    """The keys or the values of one attention.

    Attributes:
        site: the tensor that is kept.
        heads: its axis of heads; None where they have none of their own.
        rows: whether its last axis holds the features of one token (and head).
        joined: what a cache is made of, if the model is handed one: earlier tokens and new ones.
    """

    site: TensorId
    heads: int | None
    rows: bool
    joined: tuple[TensorId, ...] = ()


def key_values(graph: Graph) -> tuple[Kept, ...]:
    """The keys and values of every attention, in the order of the graph; each tensor once."""
    found: dict[TensorId, Kept] = {}
    for softmax in (s for s in softmaxes(graph) if s.type == "Softmax"):
        scores, mixed = _scores(graph, softmax), _mixed(graph, softmax)
        if scores is None or mixed is None:
            continue
        for product, operand, is_key in ((*scores, True), (*mixed, False)):
            kept = _kept(graph, product, operand, is_key=is_key)
            found.setdefault(kept.site, kept)
    return tuple(found.values())


def _scores(graph: Graph, softmax: Softmax) -> tuple[Op, int] | None:
    """The product of queries and keys, and which operand the keys are: softmax is along their tokens."""
    queue: list[tuple[TensorId, bool]] = [(softmax.scores, False)]
    seen = {softmax.scores}
    for tensor, turned in queue:
        op = graph.producer(tensor)
        if op is None:
            continue
        if _is_product(op):
            return op, int(not turned)
        if op.kind in _BETWEEN:
            perm = _perm(op)
            turned = turned != (perm is not None and perm[-2:] == (len(perm) - 1, len(perm) - 2))
            queue += [(t, turned) for t in op.data_inputs if t not in seen]
            seen.update(op.data_inputs)
    return None


def _mixed(graph: Graph, softmax: Softmax) -> tuple[Op, int] | None:
    """The product of attention's weights and values, and which operand the values are."""
    queue = [softmax.result]
    for tensor in queue:
        for op in graph.consumers(tensor):
            if _is_product(op):
                return op, 1 - op.data_inputs.index(tensor)
            if op.kind in _BETWEEN:
                queue += [t for t in op.outputs if t not in queue]
    return None


def _is_product(op: Op) -> bool:
    return op.kind is OpKind.MATMUL and len(op.data_inputs) == 2


def _kept(graph: Graph, product: Op, operand: int, *, is_key: bool) -> Kept:
    chain = list(_back(graph, product.data_inputs[operand]))
    shapes = [graph.tensors[t].shape for t in chain]
    rank = None if shapes[0] is None else len(shapes[0])
    # The last step back is the first of the flow: there, or where heads have come apart.
    at = next(
        (i for i in range(len(chain) - 1, -1, -1) if (s := shapes[i]) is not None and len(s) == rank), len(chain) - 1
    )
    heads = 1 if rank == 4 else None
    features = _features(product, operand, is_key=is_key)
    for tensor in chain[:at]:
        perm = _perm(graph.producer(tensor))
        if perm is not None:
            heads = None if heads is None else perm[heads]
            features = None if features is None else perm[features] - len(perm)
        elif _turns(graph.producer(tensor)):
            heads = features = None
    maker = graph.producer(chain[at])
    joined = maker.data_inputs if maker is not None and _joins_cache(graph, maker) else ()
    return Kept(chain[at], heads, features == -1, tuple(t for t in joined if graph.tensors[t].is_float))


def _features(product: Op, operand: int, *, is_key: bool) -> int | None:
    """The operand's axis of features, from the end: keys are summed over it, values aren't."""
    turned = (False, False) if product.attrs is None else None
    if isinstance(product.attrs, ProductAttrs):
        turned = product.attrs.transposed
    if turned is None:
        return None
    summed = -1 if (operand == 0) != turned[operand] else -2
    return summed if is_key else -3 - summed


def _back(graph: Graph, tensor: TensorId) -> Iterator[TensorId]:
    """A tensor, and those that its values come from unchanged or scaled by one number."""
    yield tensor
    while (op := graph.producer(tensor)) is not None and not _joins_cache(graph, op):
        sources = [t for t in moved_from(op) if t in graph.tensors] if op.kind is not OpKind.CONCAT else []
        if not sources and _is_scaling(graph, op):
            sources = [op.data_inputs[0]]
        if len(sources) != 1 or not graph.tensors[sources[0]].is_float:
            return
        tensor = sources[0]
        yield tensor


def _is_scaling(graph: Graph, op: Op) -> bool:
    if op.kind is not OpKind.MUL and op.type not in ("Div", "Cast"):
        return False
    return len(op.data_inputs) == 1 and all(prod(graph.params[p].shape) == 1 for p in op.params.values())


def _joins_cache(graph: Graph, op: Op) -> bool:
    """Whether an op puts new tokens behind those that a model input brings."""
    if op.kind is not OpKind.CONCAT:
        return False
    return any(_ends(_back(graph, t)) in graph.inputs for t in op.data_inputs)


def _ends(tensors: Iterable[TensorId]) -> TensorId:
    *_, last = tensors
    return last


def _perm(op: Op | None) -> tuple[int, ...] | None:
    if op is None or op.kind is not OpKind.TRANSPOSE or op.call is None:
        return None
    said = op.call.attributes.get("perm")
    return tuple(int(n) for n in said) if isinstance(said, tuple | list) else None


def _turns(op: Op | None) -> bool:
    """Whether an op exchanges axes, and doesn't say which."""
    return op is not None and op.kind is OpKind.TRANSPOSE and _perm(op) is None
