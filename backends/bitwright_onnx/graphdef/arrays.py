"""Ops of GraphDef that move data or work on shapes: reshaping, joining, slicing, padding, casting."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright_onnx.graphdef.builder import Builder, Constant, Linear
from bitwright_onnx.graphdef.nodes import Node, onnx_type

Handler = Callable[[Builder, Node], None]
LAST = np.iinfo(np.int64).max
"""A slice's end: as far as the axis goes."""


def identity(g: Builder, node: Node) -> None:
    """Ops that pass their inputs on."""
    for index, tensor in enumerate(node.inputs):
        _pass(g, tensor, node.output(index))
        if node.op != "IdentityN":
            break


def _pass(g: Builder, source: str, target: str) -> None:
    g.set(target, g.value(source))
    if source in g.linear and g.is_private(source) and g.values[target] is g.linear[source].result:
        g.linear[target] = g.linear[source]


def reshape(g: Builder, node: Node) -> None:
    """Reshape; where it splits the channels of a matrix product these can still take a bias."""
    known = g.known(node.inputs[1])
    given = g.value(node.inputs[1])
    zero = known is not None and 0 in known
    attributes = {"allowzero": 1} if zero else {}
    y = g.add("Reshape", g.value(node.inputs[0]), given, hint=node.name, **attributes)
    g.set(node.output(), y)
    linear, shape, source = g.linear.get(node.inputs[0]), g.shape(node.output()), g.shape(node.inputs[0])
    if linear is None or shape is None or source is None or not g.is_private(node.inputs[0]):
        return
    trailing = shape[len(source) - 1 :]
    if None not in trailing and trailing and np.prod(trailing) == linear.channels and linear.node.op_type == "MatMul":  # type: ignore[arg-type]
        g.linear[node.output()] = Linear(linear.node, y, linear.channels, tuple(int(t or 0) for t in trailing))


def squeeze(g: Builder, node: Node) -> None:
    """Squeeze; a convolution before it can still take a bias if the channels stay last."""
    dims = node.integers("squeeze_dims")
    axes = g.numbers(f"{node.name}/axes", dims) if dims else None
    y = g.add("Squeeze", g.value(node.inputs[0]), axes, hint=node.name)
    g.set(node.output(), y)
    linear, source = g.linear.get(node.inputs[0]), g.shape(node.inputs[0])
    if linear is None or source is None or not dims or not g.is_private(node.inputs[0]):
        return
    if all(d % len(source) != len(source) - 1 for d in dims):
        g.linear[node.output()] = Linear(linear.node, y, linear.channels, linear.trailing)


def expand_dims(g: Builder, node: Node) -> None:
    """ExpandDims."""
    axes = g.numbers(f"{node.name}/axes", np.reshape(g.constant(node, 1, "the axis"), -1))
    g.set(node.output(), g.add("Unsqueeze", g.value(node.inputs[0]), axes, hint=node.name))


def transpose(g: Builder, node: Node) -> None:
    """Transpose by a constant order."""
    order = [int(i) for i in g.constant(node, 1, "the order of axes")]
    g.set(node.output(), g.add("Transpose", g.value(node.inputs[0]), hint=node.name, perm=order))


def concat(g: Builder, node: Node) -> None:
    """ConcatV2 (axis last) and Concat (axis first)."""
    first = node.op == "Concat"
    axis = int(g.constant(node, 0 if first else len(node.inputs) - 1, "the axis"))
    parts = node.inputs[1:] if first else node.inputs[:-1]
    g.set(node.output(), g.add("Concat", *map(g.value, parts), hint=node.name, axis=axis))


def split(g: Builder, node: Node) -> None:
    """Split into equal parts, and SplitV by sizes."""
    equal = node.op == "Split"
    axis = int(g.constant(node, 0 if equal else 2, "the axis"))
    x = g.value(node.inputs[1 if equal else 0])
    count = node.integer("num_split")
    if equal:
        y = g.add("Split", x, hint=node.name, outputs=count, axis=axis, num_outputs=count)
    else:
        y = g.add("Split", x, _split_sizes(g, node, axis), hint=node.name, outputs=count, axis=axis)
    producer = y.producer()
    assert producer is not None
    for index, value in enumerate(producer.outputs):
        g.set(node.output(index), value)


def _split_sizes(g: Builder, node: Node, axis: int) -> ir.Value:
    sizes = [int(i) for i in g.constant(node, 1, "the sizes")]
    if -1 in sizes:
        shape = g.shape(node.inputs[0])
        whole = None if shape is None else shape[axis]
        if whole is None:
            raise ModelError(f"SplitV {node.name!r}: the length of axis {axis} isn't known")
        sizes[sizes.index(-1)] = whole - sum(s for s in sizes if s >= 0)
    return g.numbers(f"{node.name}/sizes", sizes)


def pack(g: Builder, node: Node) -> None:
    """Pack (stack)."""
    axis = node.integer("axis")
    axes = g.numbers(f"{node.name}/axes", [axis])
    parts = [g.add("Unsqueeze", g.value(i), axes, hint=node.name) for i in node.inputs]
    g.set(node.output(), g.add("Concat", *parts, hint=node.name, axis=axis))


def unpack(g: Builder, node: Node) -> None:
    """Unpack (unstack)."""
    axis, count = node.integer("axis"), node.integer("num")
    y = g.add("Split", g.value(node.inputs[0]), hint=node.name, outputs=count, axis=axis, num_outputs=count)
    axes, producer = g.numbers(f"{node.name}/axes", [axis]), y.producer()
    assert producer is not None
    for index, value in enumerate(producer.outputs):
        g.set(node.output(index), g.add("Squeeze", value, axes, hint=node.name))


def strided_slice(g: Builder, node: Node) -> None:
    """StridedSlice by constants, with its five masks (numpy's slicing)."""
    begins, ends, steps = ([int(i) for i in g.constant(node, i + 1, "a bound")] for i in range(3))
    masks = {k: node.integer(f"{k}_mask") for k in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    shape = g.shape(node.inputs[0])

    def on(mask: str, index: int) -> bool:
        return bool(masks[mask] >> index & 1)

    used = sum(not on("new_axis", i) and not on("ellipsis", i) for i in range(len(begins)))
    axis = 0
    starts, stops, strides, axes, new, gone = [], [], [], [], [], []
    result = 0  # axis in the output, before shrinking
    for i, (begin, end, step) in enumerate(zip(begins, ends, steps, strict=True)):
        if on("ellipsis", i):
            if shape is None:
                raise ModelError(f"StridedSlice {node.name!r}: the rank behind its ellipsis isn't known")
            skipped = len(shape) - used
            axis, result = axis + skipped, result + skipped
        elif on("new_axis", i):
            new.append(result)
            result += 1
        else:
            if on("shrink_axis", i):
                gone.append(result)
                starts.append(begin)
                stops.append(begin + 1 if begin != -1 else LAST)
                strides.append(1)
                axes.append(axis)
            else:
                whole = on("begin", i) and on("end", i) and step == 1
                if not whole:
                    starts.append((0 if step > 0 else LAST) if on("begin", i) else begin)
                    stops.append((LAST if step > 0 else -LAST) if on("end", i) else end)
                    strides.append(step)
                    axes.append(axis)
            axis, result = axis + 1, result + 1
    x = g.value(node.inputs[0])
    if axes:
        bounds = [g.numbers(f"{node.name}/{n}", v) for n, v in
                  (("starts", starts), ("ends", stops), ("axes", axes), ("steps", strides))]  # fmt: skip
        x = g.add("Slice", x, *bounds, hint=node.name)
    if new:
        x = g.add("Unsqueeze", x, g.numbers(f"{node.name}/new_axes", new), hint=node.name)
    if gone:
        x = g.add("Squeeze", x, g.numbers(f"{node.name}/lost_axes", gone), hint=node.name)
    g.set(node.output(), x if axes or new or gone else g.add("Identity", x, hint=node.name))


def slice_(g: Builder, node: Node) -> None:
    """Slice by begin and size; a size of −1 takes the rest."""
    begin, size = g.known(node.inputs[1]), g.known(node.inputs[2])
    start = g.value(node.inputs[1])
    if size is not None and (begin is not None or (size >= 0).all()):
        if begin is not None:
            stop = [LAST if s < 0 else int(b + s) for b, s in zip(begin, size, strict=True)]
            end = g.numbers(f"{node.name}/ends", stop)
        else:
            end = g.add("Add", start, g.value(node.inputs[2]), hint=node.name)
    elif size is None:
        # Taken for sizes that are no −1: a computed size comes from shapes.
        end = g.add("Add", start, g.value(node.inputs[2]), hint=node.name)
    else:
        raise ModelError(f"Slice {node.name!r}: its begin is computed and its size open")
    g.set(node.output(), g.add("Slice", g.value(node.inputs[0]), start, end, hint=node.name))


def gather(g: Builder, node: Node) -> None:
    """Gather, GatherV2 and ResourceGather's frozen form: rows of a table, or along another axis."""
    axis = int(g.constant(node, 2, "the axis")) if len(node.inputs) > 2 else 0
    if node.integer("batch_dims"):
        raise ModelError(f"{node.op} {node.name!r}: batch_dims={node.integer('batch_dims')} has no ONNX counterpart")
    y = g.add("Gather", g.value(node.inputs[0]), g.value(node.inputs[1]), hint=node.name, axis=axis)
    g.set(node.output(), y)


def gather_nd(g: Builder, node: Node) -> None:
    """GatherNd."""
    g.set(node.output(), g.add("GatherND", g.value(node.inputs[0]), g.value(node.inputs[1]), hint=node.name))


def pad(g: Builder, node: Node) -> None:
    """Pad, PadV2 (a value of one's own) and MirrorPad."""
    pairs = g.constant(node, 1, "the padding")
    amounts = g.numbers(f"{node.name}/pads", np.asarray(pairs).T.reshape(-1))
    mode, inputs = "constant", [g.value(node.inputs[0]), amounts]
    if node.op == "PadV2":
        inputs.append(g.value(node.inputs[2]))
    elif node.op == "MirrorPad":
        mode = node.text("mode").lower()
        if mode == "symmetric" and np.any(np.asarray(pairs) > 1):
            raise ModelError(f"MirrorPad {node.name!r}: SYMMETRIC by more than one has no ONNX counterpart")
        mode = "edge" if mode == "symmetric" else mode  # by one, the edge is what is mirrored
    g.set(node.output(), g.add("Pad", *inputs, hint=node.name, mode=mode))


def tile(g: Builder, node: Node) -> None:
    """Tile."""
    g.set(node.output(), g.add("Tile", g.value(node.inputs[0]), g.value(node.inputs[1]), hint=node.name))


def shape_(g: Builder, node: Node) -> None:
    """Shape, ShapeN and Size, in 64 bits."""
    for index, tensor in enumerate(node.inputs):
        kind = "Size" if node.op == "Size" else "Shape"
        g.set(node.output(index), g.add(kind, g.value(tensor), hint=node.name))


def rank_(g: Builder, node: Node) -> None:
    """Rank, where it is known."""
    shape = g.shape(node.inputs[0])
    if shape is None:
        raise ModelError(f"Rank {node.name!r}: it isn't known before run time")
    g.constants[node.output()] = Constant(np.asarray(len(shape), np.int32), None)


def cast(g: Builder, node: Node) -> None:
    """Cast; 32-bit integers are computed in 64 bits."""
    kind = onnx_type(node.dtype("DstT"))
    g.set(node.output(), g.add("Cast", g.value(node.inputs[0]), hint=node.name, to=int(kind)))


def fill(g: Builder, node: Node) -> None:
    """Fill and BroadcastTo."""
    dims, x = (node.inputs[0], node.inputs[1]) if node.op == "Fill" else (node.inputs[1], node.inputs[0])
    g.set(node.output(), g.add("Expand", g.value(x), g.value(dims), hint=node.name))


def like(g: Builder, node: Node) -> None:
    """ZerosLike and OnesLike."""
    kind = onnx_type(node.dtype("T"))
    value = g.numbers(f"{node.name}/value", node.op == "OnesLike", kind.numpy())
    g.set(node.output(), g.add("Expand", value, g.shape_of(g.value(node.inputs[0]), node.name), hint=node.name))


def range_(g: Builder, node: Node) -> None:
    """Range."""
    g.set(node.output(), g.add("Range", *map(g.value, node.inputs), hint=node.name))


def one_hot(g: Builder, node: Node) -> None:
    """OneHot."""
    indices, depth, on, off = map(g.value, node.inputs)
    values = [g.add("Unsqueeze", v, g.numbers(f"{node.name}/axes", [0]), hint=node.name) for v in (off, on)]
    pair = g.add("Concat", *values, hint=node.name, axis=0)
    y = g.add("OneHot", indices, depth, pair, hint=node.name, axis=node.integer("axis", -1))
    g.set(node.output(), y)


def bincount(g: Builder, node: Node) -> None:
    """DenseBincount of rows: how often each number is there, or whether it is; numbers beyond the size don't count."""
    weights = g.shape(node.inputs[2])
    if weights is None or 0 not in weights or len(g.shape(node.inputs[0]) or ()) != 2:
        raise ModelError(f"DenseBincount {node.name!r}: weights, or another input than rows, have no ONNX counterpart")
    kind = onnx_type(node.dtype("T")).numpy()
    pair = g.numbers(f"{node.name}/values", [0, 1], kind)
    depth = g.add("Reshape", g.value(node.inputs[1]), g.numbers(f"{node.name}/shape", [1]), hint=node.name)
    hot = g.add("OneHot", g.value(node.inputs[0]), depth, pair, hint=node.name, axis=-1)
    how = "ReduceMax" if node.flag("binary_output") else "ReduceSum"
    axes = g.numbers(f"{node.name}/axes", [1])
    g.set(node.output(), g.add(how, hot, axes, hint=node.name, keepdims=0))


def bucketize(g: Builder, node: Node) -> None:
    """Bucketize: how many boundaries a value has reached."""
    kind = onnx_type(node.dtype("T"))
    limits = g.numbers(f"{node.name}/boundaries", node.numbers("boundaries"), kind.numpy())
    x = g.add("Unsqueeze", g.value(node.inputs[0]), g.numbers(f"{node.name}/axis", [-1]), hint=node.name)
    reached = g.add("Cast", g.add("GreaterOrEqual", x, limits, hint=node.name), hint=node.name,
                    to=int(ir.DataType.INT64))  # fmt: skip
    g.set(node.output(), g.add("ReduceSum", reached, g.numbers(f"{node.name}/axes", [-1]), hint=node.name, keepdims=0))


def reverse(g: Builder, node: Node) -> None:
    """ReverseV2 along constant axes."""
    axes = [int(a) for a in g.constant(node, 1, "the axes")]
    bounds = [g.numbers(f"{node.name}/{n}", v) for n, v in
              (("starts", [-1] * len(axes)), ("ends", [-LAST] * len(axes)), ("axes", axes),
               ("steps", [-1] * len(axes)))]  # fmt: skip
    g.set(node.output(), g.add("Slice", g.value(node.inputs[0]), *bounds, hint=node.name))


def top_k(g: Builder, node: Node) -> None:
    """TopKV2."""
    k = g.add("Reshape", g.value(node.inputs[1]), g.numbers(f"{node.name}/shape", [1]), hint=node.name)
    y = g.add("TopK", g.value(node.inputs[0]), k, hint=node.name, outputs=2, axis=-1, sorted=int(node.flag("sorted")))
    producer = y.producer()
    assert producer is not None
    for index, value in enumerate(producer.outputs):
        g.set(node.output(index), value)


def space_to_batch(g: Builder, node: Node) -> None:
    """SpaceToBatchND and BatchToSpaceND around a dilated convolution, which takes their place."""
    if node.name not in g.passed:
        raise ModelError(f"{node.op} {node.name!r} doesn't surround a dilated convolution, and ONNX has no such op")
    _pass(g, node.inputs[0], node.output())


def dilated_convolutions(g: Builder) -> None:
    """Find SpaceToBatchND → (ExpandDims →) convolution (→ Squeeze) → BatchToSpaceND, how TensorFlow dilates on CPUs.

    Frozen constants only; paddings that only make the length a multiple of the block are cropped again.
    """
    for last in g.nodes.values():
        if last.op != "BatchToSpaceND":
            continue
        chain = [last]
        while len(chain) < 5 and chain[-1].op != "SpaceToBatchND":
            source = g.nodes.get(chain[-1].inputs[0].rpartition(":")[0]) if chain[-1].inputs else None
            if source is None:
                break
            chain.append(source)
        first = chain[-1]
        convolutions = [n for n in chain if n.op in ("Conv2D", "Conv3D", "DepthwiseConv2dNative")]
        between = {n.op for n in chain[1:-1]} - {"Squeeze", "ExpandDims", "Conv2D", "Conv3D", "DepthwiseConv2dNative"}
        if first.op != "SpaceToBatchND" or len(convolutions) != 1 or between:
            continue
        parts = [g.nodes[i.rpartition(":")[0]] for i in (*first.inputs[1:], *last.inputs[1:])]
        if any(p.op != "Const" for p in parts) or convolutions[0].text("padding") != "VALID":
            continue
        block, paddings, _, crops = (p.value() for p in parts)
        amounts = [(int(p[0] - c[0]), int(p[1] - c[1])) for p, c in zip(paddings, crops, strict=True)]
        rates = [int(b) for b in block]
        if any(a < 0 for pair in amounts for a in pair):
            continue
        missing = (3 if convolutions[0].op == "Conv3D" else 2) - len(rates)  # 1-D convolutions run as 2-D ones
        g.dilated[convolutions[0].name] = ((1,) * missing + tuple(rates), ((0, 0),) * missing + tuple(amounts))
        g.passed |= {first.name, last.name}


HANDLERS: Mapping[str, Handler] = {
    **dict.fromkeys(
        ("Identity", "IdentityN", "StopGradient", "Snapshot", "EnsureShape", "PreventGradient", "CheckNumerics",
         "PlaceholderWithDefault"),
        identity,
    ),
    "Reshape": reshape,
    "Squeeze": squeeze,
    "ExpandDims": expand_dims,
    "Transpose": transpose,
    **dict.fromkeys(("ConcatV2", "Concat"), concat),
    **dict.fromkeys(("Split", "SplitV"), split),
    "Pack": pack,
    "Unpack": unpack,
    "StridedSlice": strided_slice,
    "Slice": slice_,
    **dict.fromkeys(("Gather", "GatherV2"), gather),
    "GatherNd": gather_nd,
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), pad),
    "Tile": tile,
    **dict.fromkeys(("Shape", "ShapeN", "Size"), shape_),
    "Rank": rank_,
    "Cast": cast,
    **dict.fromkeys(("Fill", "BroadcastTo"), fill),
    **dict.fromkeys(("ZerosLike", "OnesLike"), like),
    "Range": range_,
    "OneHot": one_hot,
    "ReverseV2": reverse,
    "DenseBincount": bincount,
    "Bucketize": bucketize,
    "TopKV2": top_k,
    **dict.fromkeys(("SpaceToBatchND", "BatchToSpaceND"), space_to_batch),
}  # fmt: skip
