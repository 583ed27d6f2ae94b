"""Convolutions and matrix products with a weight, each with what TensorFlow wraps around it.

- a bias: BiasAdd, or an Add of a constant of the output's width
- Conv1D: ExpandDims, Conv2D, Squeeze
- dilation spelled SpaceToBatchND, convolution, BatchToSpaceND
- a dense layer on more than two dimensions: Reshape, MatMul, Reshape (`tf.tensordot`), or a batched product
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from bitwright.graph import Call, ConvAttrs, OpKind, ParamRole, TensorId
from bitwright.placement import is_mask
from bitwright_tensorflow.graph.geometry import channel_axis, spatial_axes, transposed, window_pads
from bitwright_tensorflow.graph.layouts import Reshaped, Transposed
from bitwright_tensorflow.graph.model import NodeDef, node_of
from bitwright_tensorflow.graph.network import ALIAS, Network, Read
from bitwright_tensorflow.graph.recognized import Recognized

BACKWARD = frozenset({"Conv2DBackpropInput", "Conv2DBackpropInputV2", "Conv3DBackpropInputV2"})
DEPTHWISE = "DepthwiseConv2dNative"
CONVOLUTIONS = frozenset({"Conv2D", "Conv3D", DEPTHWISE, *BACKWARD})
PRODUCTS = frozenset({"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"})
ADDS = frozenset({"Add", "AddV2", "BiasAdd"})


def linear_op(net: Network, node: NodeDef) -> Recognized | None:
    """The canonical op around a convolution or product; None where its weight is not a parameter."""
    made = _convolution if node.op in CONVOLUTIONS else _product if node.op in PRODUCTS else None
    found = None if made is None else made(net, node)
    if found is not None:
        return _with_bias(net, found)
    return made(net, node, bare=True) if made is not None and net.complete else None


@dataclass(frozen=True)
class _Wrapped:
    """A convolution with what lies directly around it.

    Attributes:
        source, end: the tensor that goes in, and the node that it comes out of.
        nodes: in order.
        kept: which of the convolution's spatial axes are the user's.
        block: dilation and paddings that SpaceToBatchND spells.
    """

    source: TensorId
    end: NodeDef
    nodes: tuple[str, ...]
    kept: tuple[int, ...]
    block: tuple[tuple[int, ...], tuple[tuple[int, int], ...]] | None = None


def _convolution(net: Network, node: NodeDef, *, bare: bool = False) -> Recognized | None:
    """A convolution; `bare`: the node by itself, of a computed weight or over sizes that are free as well."""
    backward = node.op in BACKWARD
    operands = net.operands(node)
    x = operands[2 if backward else 0]
    weight = net.weight(node, 1) if bare else net.read(node, 1)
    rank = net.rank(x)
    if weight is None or rank is None or not net.is_data(x):
        return None
    data_format = net.attr(node, "data_format", "NHWC")
    axes = spatial_axes(data_format, rank)
    wrapped = _Wrapped(x, node, (node.name,), tuple(range(len(axes))))
    if not bare:
        wrapped = _unblocked(net, node, _squeezed(net, node, x, axes, weight), data_format)
    kept = wrapped.kept
    kernel = tuple(weight.form.shape[i] for i in kept)
    steps = [net.attr(node, name) or [1] * rank for name in ("strides", "dilations")]
    if any(len(step) != rank for step in steps) or 0 in weight.form.shape:
        return None  # TensorFlow has no kernel for it
    strides, dilations = (tuple(step[axes[i]] for i in kept) for step in steps)
    padding, explicit = net.attr(node, "padding"), net.attr(node, "explicit_paddings") or []
    inner = net.shape(x) or ()
    sizes, spatial = [inner[axes[i]] for i in kept], [axes[i] for i in kept]
    extra: tuple[int, ...] = ()
    call: Call | None = None
    if wrapped.block is not None:
        dilations, pads = wrapped.block
    elif backward:
        result = net.shape(f"{node.name}:0")
        outer = [None if result is None else result[a] for a in spatial]
        if bare and (None in sizes or None in outer):  # taken for the least that gives such an input
            sizes = [1] * len(kept)
            reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
            outer = list(strides if padding == "SAME" else reach)
        geometry = transposed(padding, explicit, spatial, sizes, outer, kernel, strides, dilations)
        if geometry is None:
            return None
        pads, extra = geometry
    else:
        found = window_pads(padding, explicit, spatial, sizes, kernel, strides, dilations)
        if found is None and (not bare or set(dilations) != {1}):
            return None  # ONNX Runtime's SAME_UPPER knows no dilation
        if found is None:
            call = Call({"auto_pad": "SAME_UPPER", "channel_axis": channel_axis(data_format, rank)})
        pads = found or ((0, 0),) * len(kept)
    place = channel_axis(data_format, rank)
    channels = inner[place]
    weight, groups = _canonical_weight(node, weight, kept, channels)
    attrs = ConvAttrs(kernel, strides, dilations, pads, groups, extra if any(extra) else ())
    kind, type = (OpKind.CONV_TRANSPOSE, "ConvTranspose") if backward else (OpKind.CONV, "Conv")
    output = f"{wrapped.end.name}:0"
    # Conv1D's own tensors have one axis less.
    axis = place - (len(axes) - len(kept)) if place > 1 else place
    reads = {ParamRole.WEIGHT: weight}
    return Recognized(net.id(node), kind, type, (wrapped.source,), (output,), reads, attrs, wrapped.nodes, node.op,
                 {wrapped.source: axis, output: axis}, call=call)  # fmt: skip


def _canonical_weight(node: NodeDef, weight: Read, kept: tuple[int, ...], channels: int | None) -> tuple[Read, int]:
    """TensorFlow's (*kernel, in/groups, out), (*kernel, channels, multiplier) and (*kernel, out, in) → canonical."""
    shape = weight.form.shape
    spatial = tuple(shape[i] for i in kept)
    n = len(spatial)
    weight = weight.then(Reshaped((*spatial, *shape[-2:])))
    if node.op == DEPTHWISE:
        moved = weight.then(Transposed((n, n + 1, *range(n))))
        return moved.then(Reshaped((shape[-2] * shape[-1], 1, *spatial))), shape[-2]
    groups = 1 if node.op in BACKWARD or channels is None else channels // shape[-2]
    return weight.then(Transposed((n + 1, n, *range(n)))), groups


def _squeezed(net: Network, node: NodeDef, x: TensorId, axes: tuple[int, ...], weight: Read) -> _Wrapped:
    everything = tuple(range(len(axes)))
    plain = _Wrapped(x, node, (node.name,), everything)
    before, after = net.producer(x), net.sole(f"{node.name}:0")
    if before is None or after is None:
        return plain
    if before.op != "ExpandDims" or after.op != "Squeeze" or not net.only(x, node):
        return plain
    rank = len(axes) + 2
    place = net.ints(net.operands(before)[1])
    dropped = [d % rank for d in net.attr(after, "squeeze_dims") or []]
    if place is None or dropped != [place[0] % rank] or dropped[0] not in axes:
        return plain
    gone = axes.index(dropped[0])
    if weight.form.shape[gone] != 1:
        return plain
    kept = tuple(i for i in everything if i != gone)
    return _Wrapped(net.operands(before)[0], after, (before.name, node.name, after.name), kept)


def _unblocked(net: Network, node: NodeDef, wrapped: _Wrapped, data_format: str) -> _Wrapped:
    before, after = net.producer(wrapped.source), net.sole(f"{wrapped.end.name}:0")
    if before is None or after is None or before.op != "SpaceToBatchND" or after.op != "BatchToSpaceND":
        return wrapped
    first = net.sole(wrapped.source)
    if first is None or first.name != wrapped.nodes[0] or data_format.startswith("NC"):
        return wrapped
    block, pads = (net.ints(t) for t in net.operands(before)[1:3])
    same, crops = (net.ints(t) for t in net.operands(after)[1:3])
    plain = net.attr(node, "padding") == "VALID" and set(net.attr(node, "strides") or [1]) == {1}
    if block is None or pads is None or crops is None or block != same or not plain or any(crops[::2]):
        return wrapped
    if len(block) != len(wrapped.kept) or node.op in BACKWARD:
        return wrapped
    effective = tuple((pads[2 * i], pads[2 * i + 1] - crops[2 * i + 1]) for i in range(len(block)))
    if any(end < 0 for _, end in effective):
        return wrapped
    nodes = (before.name, *wrapped.nodes, after.name)
    return replace(wrapped, source=net.operands(before)[0], end=after, nodes=nodes, block=(block, effective))


def _product(net: Network, node: NodeDef, *, bare: bool = False) -> Recognized | None:
    operands = net.operands(node)
    if len(operands) != 2 or not net.is_data(operands[0]):
        return None
    weight = net.weight(node, 1) if bare else net.read(node, 1)
    if weight is None or len(weight.form.shape) != 2:
        return None
    if node.op == "Einsum":
        swapped = _einsum_weight(net.attr(node, "equation", ""))
        if swapped is None:
            return None
    else:
        first, second = ("transpose_a", "transpose_b") if node.op == "MatMul" else ("adj_x", "adj_y")
        if net.attr(node, first):
            return None
        swapped = bool(net.attr(node, second))
    weight = weight if swapped else weight.then(Transposed((1, 0)))
    nodes: tuple[str, ...] = (node.name,)
    source, end = operands[0], node
    if not bare:
        source, end, nodes = _folded(net, node, operands[0], weight.form.shape)
    rank = net.rank(source)
    output = f"{end.name}:0"
    channels = {} if rank is None else {source: rank - 1, output: rank - 1}
    type = "Gemm" if rank == 2 else "MatMul"
    reads = {ParamRole.WEIGHT: weight}
    return Recognized(net.id(node), OpKind.LINEAR, type, (source,), (output,), reads, None, nodes, node.op,
                 channels)  # fmt: skip


def _einsum_weight(equation: str) -> bool | None:
    """Whether the weight of "…c,cd->…d" is stored (out, in); None where the product is not a linear op."""
    match = re.fullmatch(r"([A-Za-z.]+),([A-Za-z])([A-Za-z])->([A-Za-z.]+)", equation.replace(" ", ""))
    if match is None:
        return None
    left, a, b, right = match.groups()
    if left[:-1] != right[:-1] or len(set(left)) < len(left.replace("...", ".")):
        return None
    if (left[-1], right[-1]) == (a, b) and a != b and b not in left:
        return False
    return True if (left[-1], right[-1]) == (b, a) and a != b and a not in left else None


def _folded(
    net: Network, node: NodeDef, x: TensorId, weight: tuple[int, ...]
) -> tuple[TensorId, NodeDef, tuple[str, ...]]:
    """Reshape to a matrix, product, Reshape back: as one product on the last axis."""
    plain = (x, node, (node.name,))
    before, after = net.producer(x), net.sole(f"{node.name}:0")
    if before is None or after is None:
        return plain
    if before.op != "Reshape" or after.op != "Reshape" or not net.only(x, node):
        return plain
    source, nodes = net.operands(before)[0], [before.name, node.name, after.name]
    turned = net.producer(source)
    if turned is not None and turned.op == "Transpose" and net.only(source, before):
        order = net.ints(net.operands(turned)[1])
        if order is not None and list(order) == sorted(order):
            source, nodes = net.operands(turned)[0], [turned.name, *nodes]
    if not net.is_data(source):
        return plain
    into, out, matrix = net.shape(source), net.shape(f"{after.name}:0"), net.shape(x)
    if into is None or out is None or matrix is None or len(into) != len(out) or len(into) < 2 or len(matrix) != 2:
        return plain
    # With equal leading sizes, at most one of them free, both reshapes only join and split these.
    same = into[:-1] == out[:-1] and sum(n is None for n in into[:-1]) <= 1
    same = same and into[-1] == weight[1] and out[-1] == weight[0]
    if not same and not (matrix[1] == weight[1] and _restores(net, after, source, len(into), weight)):
        return plain
    return source, after, tuple(nodes)


def _restores(net: Network, after: NodeDef, source: TensorId, rank: int, weight: tuple[int, ...]) -> bool:
    """Whether a Reshape goes back to the leading sizes of `source`, as `tf.tensordot` computes them."""
    shape = net.node(node_of(net.operands(after)[1]))
    if shape.op != "ConcatV2" or len(net.operands(shape)) != 3:
        return False
    sizes, width = net.operands(shape)[:2]
    gather = net.node(node_of(sizes))
    if net.ints(width) != weight[:1] or gather.op != "GatherV2":
        return False
    of = net.node(node_of(net.operands(gather)[0]))
    known = of.op == "Shape" and net.operands(of)[0] in (source, net.resolve(source))
    return known and net.ints(net.operands(gather)[1]) == tuple(range(rank - 1))


def _with_bias(net: Network, found: Recognized) -> Recognized:
    width = _width(found)
    while (after := net.sole(found.outputs[0])) is not None:
        if after.op in ADDS and ParamRole.BIAS not in found.reads and not _named(net, found):
            bias = bias_of(net, found, after, width)
            if bias is None:
                return found
            found = replace(found, reads={**found.reads, ParamRole.BIAS: bias})
        elif ALIAS not in after.attr:
            return found
        found = _moved(found, after)
    # The Identity that names a model's output is read by nothing.
    return found


def _named(net: Network, found: Recognized) -> bool:
    return ALIAS in net.node(found.end).attr


def _moved(found: Recognized, after: NodeDef) -> Recognized:
    output = f"{after.name}:0"
    channels = dict(found.channels)
    if found.outputs[0] in channels:
        channels[output] = channels.pop(found.outputs[0])
        if found.inputs[0] in found.channels:
            channels[found.inputs[0]] = found.channels[found.inputs[0]]
    return replace(found, outputs=(output,), nodes=(*found.nodes, after.name), channels=channels)


def _width(found: Recognized) -> int:
    shape = found.reads[ParamRole.WEIGHT].form.shape
    if found.kind is OpKind.CONV_TRANSPOSE:
        return shape[1] * (found.attrs.groups if isinstance(found.attrs, ConvAttrs) else 1)
    return shape[0]


def bias_of(net: Network, found: Recognized, add: NodeDef, width: int) -> Read | None:
    """The constant that an Add gives each output channel; None where it is something else."""
    operands = net.operands(add)
    places = [i for i, t in enumerate(operands) if not net.is_data(t)]
    if len(operands) == 2 and len(places) == 1 and add.op != "BiasAdd":
        value = net.held(add, places[0])
        if value is not None and is_mask(value):
            return None
    if len(operands) != 2 or len(places) != 1:
        return None
    bias = net.read(add, places[0])
    rank = net.rank(found.outputs[0])
    if bias is None or rank is None or math.prod(bias.form.shape) != width:
        return None
    axis = found.channels.get(found.outputs[0], rank - 1)
    shape = bias.form.shape
    if add.op == "BiasAdd":
        data_format = net.attr(add, "data_format", "NHWC")
        fits = len(shape) == 1 and channel_axis(data_format, rank) == axis
    else:
        aligned = (1,) * (rank - len(shape)) + shape
        fits = len(aligned) == rank and aligned[axis] == width
    return bias.then(Reshaped((width,))) if fits else None
