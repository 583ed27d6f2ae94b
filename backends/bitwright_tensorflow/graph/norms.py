"""Normalizations: TensorFlow's fused op, and the arithmetic that Keras and `tf.nn` spell them with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bitwright.graph import AxisAttrs, BatchNormAttrs, Call, OpKind, ParamRole, TensorId
from bitwright_tensorflow.graph.geometry import channel_axis
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.layouts import Reshaped
from bitwright_tensorflow.graph.model import NodeDef, node_of
from bitwright_tensorflow.graph.network import PASSING, Network, Read
from bitwright_tensorflow.graph.recognized import Recognized

R = ParamRole
FUSED = frozenset({"FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"})
_ADD, _MUL = frozenset({"Add", "AddV2"}), frozenset({"Mul"})


def fused_batch_norm(net: Network, node: NodeDef) -> Recognized | None:
    """FusedBatchNorm in inference with constant statistics."""
    if node.op not in FUSED or net.attr(node, "is_training", True):
        return None
    x = net.operands(node)[0]
    rank = net.rank(x)
    reads = {role: net.read(node, i) for i, role in enumerate((R.GAMMA, R.BETA, R.MEAN, R.VAR), 1)}
    if rank is None or not net.is_data(x) or any(r is None or len(r.form.shape) != 1 for r in reads.values()):
        return None
    if any(net.readers(f"{node.name}:{i}") for i in range(1, 6)):
        return None
    axis = channel_axis(net.attr(node, "data_format", "NHWC"), rank)
    attrs = BatchNormAttrs(net.attr(node, "epsilon", 1e-4), axis)
    given = {role: read for role, read in reads.items() if read is not None}
    output = f"{node.name}:0"
    return Recognized(node.name, OpKind.BATCH_NORM, "BatchNormalization", (x,), (output,), given, attrs, (node.name,),
                 node.op, {x: axis, output: axis})  # fmt: skip


def spelled_norm(net: Network, node: NodeDef) -> Recognized | None:
    """x·s + t with s = γ/√(var + ε), t = β − mean·s: a batch norm where mean and var are parameters, a layer norm
    where they are moments of x over the last axes."""
    if node.op not in _ADD:
        return None
    for product, shift in _both(net.operands(node)):
        mul = _node(net, product, _MUL)
        if mul is None or not net.is_data(product) or not net.only(product, node):
            continue
        for x, scale in _both(net.operands(mul)):
            if not net.is_data(x):
                continue
            found = _scale(net, scale)
            moved = None if found is None else _shift(net, shift, scale)
            if found is None or moved is None:
                continue
            norm = _batch_norm(net, node, mul, x, found, moved) or _layer_norm(net, node, mul, x, found, moved)
            if norm is not None:
                return norm
    return None


@dataclass(frozen=True)
class _Scale:
    """γ/√(variance + ε)."""

    variance: tuple[NodeDef, int]
    epsilon: float
    gamma: tuple[NodeDef, int] | None
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class _Shift:
    """β − mean·s."""

    mean: tuple[NodeDef, int]
    beta: tuple[NodeDef, int] | None
    nodes: tuple[str, ...]


def _both(operands: list[TensorId]) -> Iterator[tuple[TensorId, TensorId]]:
    if len(operands) == 2:
        yield operands[0], operands[1]
        yield operands[1], operands[0]


def _node(net: Network, tensor: TensorId, ops: frozenset[str] | str) -> NodeDef | None:
    """The node behind a tensor, constant or not, if it is of these types."""
    name = node_of(_through(net, tensor))
    if _through(net, tensor) in net.inputs:
        return None
    node = net.node(name)
    return node if node.op in ({ops} if isinstance(ops, str) else ops) else None


def _through(net: Network, tensor: TensorId) -> TensorId:
    tensor = net.resolve(tensor)
    while tensor not in net.inputs and net.node(node_of(tensor)).op in PASSING and node_of(tensor) in net.constant:
        tensor = data_operands(net.node(node_of(tensor)))[0]
    return tensor


def _places(net: Network, node: NodeDef) -> Iterator[tuple[tuple[NodeDef, int], TensorId]]:
    """Each operand place of a binary node with the other operand."""
    operands = data_operands(node)
    if len(operands) == 2:
        yield (node, 0), operands[1]
        yield (node, 1), operands[0]


def _scale(net: Network, tensor: TensorId) -> _Scale | None:
    root = _node(net, tensor, "Rsqrt")
    if root is not None:
        return _root(net, root, None, ())
    product = _node(net, tensor, _MUL)
    if product is None:
        return None
    for gamma, other in _places(net, product):
        root = _node(net, other, "Rsqrt")
        if root is not None:
            return _root(net, root, gamma, (product.name,))
    return None


def _root(net: Network, root: NodeDef, gamma: tuple[NodeDef, int] | None, nodes: tuple[str, ...]) -> _Scale | None:
    total = _node(net, data_operands(root)[0], _ADD)
    if total is None:
        return None
    for variance, other in _places(net, total):
        epsilon = net.scalar(other)
        if epsilon is not None:
            return _Scale(variance, epsilon, gamma, (total.name, root.name, *nodes))
    return None


def _shift(net: Network, tensor: TensorId, scale: TensorId) -> _Shift | None:
    """β − mean·s in its spellings: Sub; Neg(mean)·s, with or without + β; Neg(mean·s)."""
    node = _node(net, tensor, _ADD | {"Sub", "Mul", "Neg"})
    if node is None:
        return None
    if node.op == "Sub":
        product = _scaled(net, data_operands(node)[1], scale)
        return None if product is None else _Shift(product[0], (node, 0), (product[1], node.name))
    if node.op == "Neg":
        product = _scaled(net, data_operands(node)[0], scale)
        return None if product is None else _Shift(product[0], None, (product[1], node.name))
    if node.op == "Mul":
        negated = _negated(net, tensor, scale)
        return None if negated is None else _Shift(negated[0], None, negated[1])
    for beta, other in _places(net, node):
        negated = _negated(net, other, scale)
        if negated is not None:
            return _Shift(negated[0], beta, (*negated[1], node.name))
    return None


def _scaled(net: Network, tensor: TensorId, scale: TensorId) -> tuple[tuple[NodeDef, int], str] | None:
    product = _node(net, tensor, _MUL)
    for place, other in _places(net, product) if product is not None else ():
        if _through(net, other) == _through(net, scale):
            return place, product.name if product is not None else ""
    return None


def _negated(net: Network, tensor: TensorId, scale: TensorId) -> tuple[tuple[NodeDef, int], tuple[str, ...]] | None:
    scaled = _scaled(net, tensor, scale)
    if scaled is None:
        return None
    (product, index), name = scaled
    negative = _node(net, data_operands(product)[index], "Neg")
    return None if negative is None else ((negative, 0), (negative.name, name))


def _batch_norm(
    net: Network, node: NodeDef, mul: NodeDef, x: TensorId, scale: _Scale, shift: _Shift
) -> Recognized | None:
    places = {R.GAMMA: scale.gamma, R.BETA: shift.beta, R.MEAN: shift.mean, R.VAR: scale.variance}
    reads: dict[R, Read] = {}
    axis: int | None = None
    rank = net.rank(x)
    for role, place in places.items():
        if place is None:
            continue
        read = net.read(*place)
        if read is None or rank is None:
            return None
        shape = (1,) * (rank - len(read.form.shape)) + read.form.shape
        wide = [i for i, n in enumerate(shape) if n != 1]
        if len(wide) > 1 or (axis is not None and wide and wide[0] != axis):
            return None
        axis = wide[0] if wide else axis
        reads[role] = read.then(Reshaped((max(shape),)))
    axis = (rank or 1) - 1 if axis is None else axis
    if len({read.form.shape for read in reads.values()}) != 1:
        return None
    output = f"{node.name}:0"
    return Recognized(node.name, OpKind.BATCH_NORM, "BatchNormalization", (x,), (output,), reads,
                 BatchNormAttrs(scale.epsilon, axis), (mul.name, node.name), "batch normalization",
                 {x: axis, output: axis})  # fmt: skip


def _layer_norm(
    net: Network, node: NodeDef, mul: NodeDef, x: TensorId, scale: _Scale, shift: _Shift
) -> Recognized | None:
    mean = _operand_node(net, shift.mean, "Mean")
    variance = _operand_node(net, scale.variance, "Mean")
    rank = net.rank(x)
    if mean is None or variance is None or rank is None or net.operands(mean)[0] != x:
        return None
    squared = _node(net, net.operands(variance)[0], frozenset({"SquaredDifference"}))
    if squared is None:
        return None
    inside = [net.operands(squared)[i] for i in (0, 1)]
    if {*inside} != {x, f"{mean.name}:0"}:
        return None
    axes = [net.ints(net.operands(m)[1]) for m in (mean, variance)]
    if axes[0] is None or axes[0] != axes[1]:
        return None
    over = sorted(a % rank for a in axes[0])
    if over != list(range(rank - len(over), rank)):
        return None
    reads: dict[R, Read] = {}
    for role, place in ((R.GAMMA, scale.gamma), (R.BETA, shift.beta)):
        if place is None:
            continue
        read = net.read(*place)
        if read is None:
            return None
        shape = read.form.shape
        if len(shape) == rank and all(n == 1 for n in shape[: over[0]]):
            read = read.then(Reshaped(shape[over[0] :]))
        elif len(shape) != len(over):
            return None
        reads[role] = read
    names = {mean.name, squared.name, variance.name, *scale.nodes, *shift.nodes, mul.name, node.name}
    nodes = tuple(n for n in net.inference.order if n in names and n not in net.constant)
    for name in nodes[:-1]:
        if net.is_end(f"{name}:0") or any(reader not in names for reader, _ in net.readers(f"{name}:0")):
            return None
    output = f"{node.name}:0"
    return Recognized(node.name, OpKind.LAYER_NORM, "LayerNormalization", (x,), (output,), reads, AxisAttrs(over[0]),
                      nodes, "layer normalization", {x: rank - 1, output: rank - 1},
                      call=Call({"axis": over[0], "epsilon": scale.epsilon}))  # fmt: skip


def _operand_node(net: Network, place: tuple[NodeDef, int], op: str) -> NodeDef | None:
    return _node(net, data_operands(place[0])[place[1]], op)
