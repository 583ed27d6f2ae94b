"""Values of attention, head by head: from the linear op that makes them to the one that reads what attention mixes.

Attention mixes values over tokens with one weight for all channels of a head, so that a change of basis within a head
passes through it: (A V) Q = A (V Q). Which channel ends up where is followed by running numbers of channels through
the ops between, so that any way of splitting, repeating (grouped queries) and joining heads is understood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import AxisAttrs, Graph, Op, OpId, OpKind, ParamRole, ProductAttrs, TensorId

Index = NDArray[np.intp]

_BETWEEN = frozenset({OpKind.IDENTITY, OpKind.MUL, OpKind.ELEMENTWISE, OpKind.RESHAPE, OpKind.TRANSPOSE})
"""What may lie between a softmax and the product with the values."""
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"})
_FREE = 2
"""Stands in for samples and tokens where their number isn't known: enough to see whether channels depend on them."""


@dataclass(frozen=True, eq=False)
class ValueHeads:
    """The values of one attention.

    Attributes:
        writer: the linear op that makes them.
        constants: additions of a constant to them, channels last.
        reader: the linear op that reads what is mixed.
        channels: of each head in the writer's output, (heads, width).
        features: of the reader's input, (copies, width); a head that several queries share has several.
        head_of: of each copy, (copies,).
    """

    writer: Op
    constants: tuple[Op, ...]
    reader: Op
    channels: Index
    features: Index
    head_of: Index


class _Blocked(Exception):
    """The message says by what."""


def value_heads(graph: Graph) -> Iterator[tuple[OpId, ValueHeads | str]]:
    """The values of every attention (a product behind a softmax), in topological order.

    Yields:
        The op that makes them, or the product where none is found; and their heads, or why their basis has to stay.
    """
    softmaxes = (op for op in graph if op.kind is OpKind.SOFTMAX)
    products = dict.fromkeys(p for s in softmaxes for p in _products(graph, s))
    for id in products:
        product = graph.op(id)
        tensor = product.data_inputs[1]
        behind: list[tuple[Op, TensorId]] = []
        writer: Op | None = None
        try:
            while writer is None:
                op = _maker(graph, tensor)
                if op.kind is OpKind.LINEAR:
                    writer = op
                else:
                    behind.append((op, tensor))
                    tensor = op.data_inputs[0]
            yield writer.id, _followed(graph, writer, behind[::-1], product)
        except _Blocked as blocked:
            yield (writer or product).id, str(blocked)


def _products(graph: Graph, softmax: Op) -> Iterator[OpId]:
    queue = list(softmax.outputs[:1])
    for tensor in queue:
        for op in graph.consumers(tensor):
            if op.kind is OpKind.MATMUL and len(op.data_inputs) == 2 and op.data_inputs[0] == tensor:
                yield op.id
            elif op.kind in _BETWEEN:
                queue += [t for t in op.outputs if t not in queue]


def _maker(graph: Graph, tensor: TensorId) -> Op:
    """What makes a tensor that one op alone reads."""
    op = graph.producer(tensor)
    if op is None:
        raise _Blocked(f"{tensor!r} is an input of the model")
    if tensor in graph.outputs:
        raise _Blocked(f"{tensor!r} is an output of the model")
    if graph.sole_consumer(tensor) is None:
        raise _Blocked(f"{tensor!r} has other readers")
    if op.kind is OpKind.LINEAR or _adds_constant(graph, op):
        return op
    if op.kind not in (OpKind.IDENTITY, OpKind.RESHAPE, OpKind.TRANSPOSE, OpKind.SPLIT) or not op.data_inputs:
        raise _Blocked(f"{op.id!r} ({op.type}) makes the values")
    return op


def _adds_constant(graph: Graph, op: Op) -> bool:
    """Whether an op adds a number for each channel, the last axis of its input."""
    constant, shape = op.params.get(ParamRole.CONSTANT), graph.tensors[op.output].shape
    if op.kind is not OpKind.ADD or op.type != "Add" or constant is None or len(op.data_inputs) != 1 or not shape:
        return False
    own = graph.params[constant].shape
    return bool(own) and own[-1] == shape[-1] and prod(own) == own[-1]


def _followed(graph: Graph, writer: Op, behind: Sequence[tuple[Op, TensorId]], product: Op) -> ValueHeads:
    weight = None if writer.weight is None else graph.params[writer.weight].shape
    if weight is None or len(weight) != 2:
        raise _Blocked(f"{writer.id!r} has no matrix of its own")
    labels: Index = np.broadcast_to(np.arange(weight[0]), _sizes(graph, writer.output, weight[0]))
    constants: list[Op] = []
    for op, tensor in behind:
        if op.kind is OpKind.ADD:
            if labels.shape[-1] != weight[0] or (labels != np.arange(weight[0])).any():
                raise _Blocked(f"{op.id!r} adds to heads that have come apart")
            constants.append(op)
        labels = _moved(graph, op, tensor, labels)
    attrs = product.attrs
    plain = attrs is None or (isinstance(attrs, ProductAttrs) and attrs.transposed in ((False, False), (True, False)))
    if product.type != "MatMul" or not plain or labels.ndim < 2:
        raise _Blocked(f"{product.id!r} ({product.type}) doesn't multiply by the values as they stand")
    if (labels != labels[..., :1, :]).any():
        raise _Blocked(f"which channel is which depends on the token at {product.id!r}")
    rows = labels[..., 0, :]
    width = rows.shape[-1]
    channels, head = np.unique(rows.reshape(-1, width), axis=0, return_inverse=True)
    if width < 2 or len(np.unique(channels)) != channels.size:
        raise _Blocked(f"heads share channels at {product.id!r}")
    mixed = _sizes(graph, product.output, width)
    try:
        heads = np.broadcast_to(head.reshape(rows.shape[:-1])[..., None], mixed[:-1])
    except ValueError:
        raise _Blocked(f"the shape of {product.output!r} isn't known") from None
    # What arrives is told apart by the vector of a head that it belongs to, and by the place in it.
    arrived, tensor = np.arange(prod(mixed)).reshape(mixed), product.output
    while (reader := graph.sole_consumer(tensor)) is not None and reader.kind is not OpKind.LINEAR:
        if reader.kind not in (OpKind.IDENTITY, OpKind.RESHAPE, OpKind.TRANSPOSE):
            raise _Blocked(f"{reader.id!r} ({reader.type}) reads what attention mixes")
        arrived, tensor = _moved(graph, reader, reader.output, arrived), reader.output
    shape = None if reader is None or reader.weight is None else graph.params[reader.weight].shape
    if reader is None or shape is None or len(shape) != 2 or arrived.shape[-1] != shape[1]:
        raise _Blocked(f"no linear op alone reads {tensor!r}")
    if shape[1] % width:
        raise _Blocked(f"{reader.id!r} reads parts of heads")
    flat = arrived.reshape(-1, shape[1])
    features = np.argsort(flat[0]).reshape(-1, width)
    vectors, places = np.divmod(flat[:, features], width)
    owners = heads.reshape(-1)[vectors]
    if (vectors != vectors[..., :1]).any() or (places != np.arange(width)).any() or (owners != owners[:1]).any():
        raise _Blocked(f"{reader.id!r} reads parts of heads, or which one depends on the token")
    return ValueHeads(writer, tuple(constants), reader, channels, features, owners[0, :, 0])


def _sizes(graph: Graph, tensor: TensorId, last: int) -> tuple[int, ...]:
    """The shape of a tensor of `last` channels, with stand-ins for what isn't known."""
    shape = graph.tensors[tensor].shape
    if not shape or shape[-1] not in (last, None):
        raise _Blocked(f"the shape of {tensor!r} isn't known")
    return (*(_FREE if n is None else n for n in shape[:-1]), last)


def _moved(graph: Graph, op: Op, output: TensorId, values: Index) -> Index:
    """What an op that computes nothing makes of an array in the place of its input."""
    if op.kind in (OpKind.IDENTITY, OpKind.ADD):
        return values
    try:
        if op.kind is OpKind.TRANSPOSE:
            perm = op.call.attributes.get("perm") if op.call is not None else None
            if isinstance(perm, tuple):
                return values.transpose([int(n) for n in perm])
        elif op.kind is OpKind.SPLIT:
            if isinstance(op.attrs, AxisAttrs) and op.type == "Split":
                return _piece(graph, op, output, values, op.attrs.axis)
        elif op.type in _RESHAPES and (shape := graph.tensors[output].shape) is not None:
            wanted = [_FREE if n is None else n for n in shape]
            if op.type == "Expand":
                return np.broadcast_to(values, wanted)
            if prod(wanted) != values.size and None in shape:
                wanted[shape.index(None)] = -1
            return values.reshape(wanted)
    except (ValueError, IndexError):
        pass
    raise _Blocked(f"how {op.id!r} ({op.type}) moves channels isn't known")


def _piece(graph: Graph, op: Op, output: TensorId, values: Index, axis: int) -> Index:
    """One of the pieces that a split makes, whose axis some leave out.

    Raises:
        ValueError, IndexError: the pieces aren't known.
    """
    index, shapes = op.outputs.index(output), [graph.tensors[t].shape or () for t in op.outputs]
    if len(shapes[index]) == values.ndim - 1 and len(shapes) == values.shape[axis]:
        return np.asarray(np.take(values, index, axis))
    sizes = [shape[axis] or 0 for shape in shapes]
    if sum(sizes) != values.shape[axis]:
        raise ValueError
    return np.split(values, np.cumsum(sizes)[:-1], axis)[index]
