"""Ops that are one node."""

from __future__ import annotations

from bitwright.graph import (
    CONSTANT_KINDS,
    ActivationAttrs,
    Attrs,
    AxisAttrs,
    OpKind,
    ParamRole,
    PoolAttrs,
    ProductAttrs,
    TensorId,
)
from bitwright_tensorflow.graph.geometry import channel_axis, pool_window, spatial_axes
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.linear_ops import BACKWARD, CONVOLUTIONS
from bitwright_tensorflow.graph.model import NodeDef
from bitwright_tensorflow.graph.network import Network, Read
from bitwright_tensorflow.graph.optable import KINDS
from bitwright_tensorflow.graph.recognized import Recognized

_WINDOWS = frozenset({"AvgPool", "AvgPool3D", "MaxPool", "MaxPool3D"})
_GATHERS = frozenset({"Gather", "GatherV2"})


def single_op(net: Network, node: NodeDef, outputs: tuple[TensorId, ...]) -> Recognized:
    """A node as a canonical op; OPAQUE if nothing is known about it."""
    kind, type = KINDS.get(node.op, (OpKind.OPAQUE, node.op))
    if not outputs or not net.is_float(outputs[0]):
        kind = OpKind.OPAQUE
    attrs: Attrs | None = None
    reads: dict[ParamRole, Read] = {}
    channels: dict[TensorId, int] = {}
    order: tuple[int, ...] | None = None
    data = tuple(net.data(node))
    if node.op in CONVOLUTIONS and len(data) == 2 and kind is OpKind.OPAQUE and outputs and net.is_float(outputs[0]):
        kind, type = OpKind.MATMUL, "ConvTranspose" if node.op in BACKWARD else "Conv"  # of two activations
    match kind:
        case OpKind.PRELU:
            attrs = ActivationAttrs(alpha=net.attr(node, "alpha", 0.2))
        case OpKind.MATMUL if type == "MatMul":
            names = ("transpose_a", "transpose_b") if node.op == "MatMul" else ("adj_x", "adj_y")
            first, second = (bool(net.attr(node, name)) for name in names)
            attrs = ProductAttrs((first, second)) if first or second else None
        case OpKind.SOFTMAX:
            rank = net.rank(outputs[0])
            attrs = AxisAttrs(-1 if rank is None else rank - 1)
        case OpKind.CONCAT | OpKind.SPLIT:
            place = _axis(net, node, outputs[0] if kind is OpKind.CONCAT else data[0] if data else outputs[0])
            kind, attrs = (OpKind.OPAQUE, None) if place is None else (kind, AxisAttrs(place))
        case OpKind.AVERAGE_POOL if node.op == "Mean":
            kind, type, attrs = _mean(net, node)
        case OpKind.AVERAGE_POOL | OpKind.MAX_POOL if node.op in _WINDOWS:
            attrs, channels = _window(net, node, outputs[0])
        case OpKind.TRANSPOSE:
            order = net.ints(net.operands(node)[1])
        case OpKind.SLICE if node.op in _GATHERS:
            table = _embedding(net, node)
            if table is not None:
                kind, reads = OpKind.EMBEDDING, {ParamRole.WEIGHT: table}
        case OpKind.PAD:
            reads = _padding(net, node)
        case OpKind.RESIZE:
            rank = net.rank(outputs[0])
            channels = dict.fromkeys((*data[:1], outputs[0]), 3) if rank == 4 else {}
        case OpKind.OPAQUE if node.op == "Cast" and outputs and net.is_float(outputs[0]):
            kind = OpKind.ELEMENTWISE
        case OpKind.MUL if node.op == "Square":
            data = (*data, *data)
    if node.op == "Cast" and outputs and data and net.is_float(outputs[0]):
        same = net.inference.dtype(data[0]) == net.inference.dtype(outputs[0])
        kind, type = (OpKind.IDENTITY, "Identity") if same else (OpKind.ELEMENTWISE, "Cast")
    if kind in CONSTANT_KINDS and not reads:
        reads = _constant(net, node)
    return Recognized(net.id(node), kind, type, data, outputs, reads, attrs, (node.name,), node.op, channels, order)


def _constant(net: Network, node: NodeDef) -> dict[ParamRole, Read]:
    """The first constant float operand of an op that has no roles of its own."""
    for index, tensor in enumerate(data_operands(node)):
        if not net.is_data(tensor) and (read := net.read(node, index)) is not None:
            return {ParamRole.CONSTANT: read}
    return {}


def _axis(net: Network, node: NodeDef, like: TensorId) -> int | None:
    rank = net.rank(like)
    if node.op in ("Pack", "Unpack", "ParallelConcat"):
        place: int | None = net.attr(node, "axis", 0)
    else:
        operands = net.operands(node)
        index = {"ConcatV2": -1, "Concat": 0, "Split": 0, "SplitV": 2}[node.op]
        given = net.ints(operands[index])
        place = None if given is None else given[0]
    if place is None or rank is None:
        return place
    return place % rank


def _mean(net: Network, node: NodeDef) -> tuple[OpKind, str, PoolAttrs | None]:
    operands = net.operands(node)
    rank, axes = net.rank(operands[0]), net.ints(operands[1])
    if axes is None or rank is None:
        return OpKind.ELEMENTWISE, "ReduceMean", None
    over = tuple(sorted(a % rank for a in axes))
    keep = bool(net.attr(node, "keep_dims", False))
    spatial = rank > 2 and over in (tuple(range(1, rank - 1)), tuple(range(2, rank)))
    return (
        OpKind.AVERAGE_POOL,
        "GlobalAveragePool" if keep and spatial else "ReduceMean",
        PoolAttrs(axes=over, keepdims=keep),
    )


def _window(net: Network, node: NodeDef, output: TensorId) -> tuple[PoolAttrs, dict[TensorId, int]]:
    x = net.operands(node)[0]
    data_format, shape = net.attr(node, "data_format", "NHWC"), net.shape(x)
    rank = 5 if node.op.endswith("3D") else 4
    axes = spatial_axes(data_format, rank)
    kernel, strides = ([(net.attr(node, n) or [1] * rank)[a] for a in axes] for n in ("ksize", "strides"))
    sizes = [None if shape is None else shape[a] for a in axes]
    explicit = net.attr(node, "explicit_paddings") or []
    window = pool_window(net.attr(node, "padding"), explicit, axes, sizes, kernel, strides)
    axis = channel_axis(data_format, rank)
    return PoolAttrs(window=window), {x: axis, output: axis}


def _embedding(net: Network, node: NodeDef) -> Read | None:
    """Rows of a constant table."""
    operands = net.operands(node)
    if not net.is_data(operands[1]) or net.is_data(operands[0]) or net.attr(node, "batch_dims", 0):
        return None
    if node.op == "GatherV2" and net.ints(operands[2]) != (0,):
        return None
    table = net.read(node, 0)
    return table if table is not None and len(table.form.shape) == 2 else None


def _padding(net: Network, node: NodeDef) -> dict[ParamRole, Read]:
    """A padding value other than zero."""
    if node.op != "PadV2" or net.scalar(net.operands(node)[2]) == 0:
        return {}
    read = net.read(node, 2)
    return {} if read is None else {ParamRole.CONSTANT: read}
