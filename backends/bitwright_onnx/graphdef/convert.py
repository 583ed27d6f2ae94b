"""Frozen TensorFlow graphs as ONNX models, under TensorFlow's own tensor names.

Why not tf2onnx: it names and moves tensors as its optimizer sees fit (channels-first twins of a tensor bypass the
one that has the site's name, biases and batch norms are merged into weights), and quantize/dequantize pairs must sit
on the very tensors that the encodings name. Here each TensorFlow tensor is one ONNX value in its own layout, and a
weight is one initializer in ONNX's layout. (tf2onnx 1.17 no longer pins protobuf; older releases exclude onnx 1.23.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright_onnx.capture.folding import KEPT
from bitwright_onnx.graphdef import arrays as graphdef_arrays
from bitwright_onnx.graphdef import conv as graphdef_conv
from bitwright_onnx.graphdef import math as graphdef_math
from bitwright_onnx.graphdef import recurrent as graphdef_recurrent
from bitwright_onnx.graphdef.builder import Builder, Constant
from bitwright_onnx.graphdef.calls import inline_calls
from bitwright_onnx.graphdef.folding import fold
from bitwright_onnx.graphdef.nodes import INT32, Node, onnx_type, tensor_name
from bitwright_onnx.graphdef.recurrent import Recurrent, stand_ins

OPSET = 20
_SKIPPED = frozenset({"NoOp", "Assert", "Placeholder", "Const"})

HANDLERS: Mapping[str, Callable[[Builder, Node], None]] = {
    **graphdef_math.HANDLERS,
    **graphdef_arrays.HANDLERS,
    **dict.fromkeys(("Conv2D", "Conv3D"), graphdef_conv.convolution),
    graphdef_recurrent.OP: graphdef_recurrent.recurrent,
    "DepthwiseConv2dNative": graphdef_conv.depthwise,
    **dict.fromkeys(("Conv2DBackpropInput", "Conv3DBackpropInputV2"), graphdef_conv.transposed),
    **dict.fromkeys(("MaxPool", "AvgPool", "MaxPool3D", "AvgPool3D"), graphdef_conv.pool),
    **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), graphdef_conv.batch_norm),
    **dict.fromkeys(("ResizeBilinear", "ResizeNearestNeighbor"), graphdef_conv.resize),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), graphdef_conv.depth_to_space),
}
"""TensorFlow op → what writes it as ONNX."""


def import_graphdef(
    graph_def: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    names: Mapping[str, str] | None = None,
    kept: Collection[str] = (),
    recurrent: Sequence[Recurrent] = (),
    decode: Callable[[Any], Any] | None = None,
    output_names: Sequence[str] | None = None,
) -> ir.Model:
    """A frozen GraphDef as an ONNX model.

    Args:
        graph_def: a GraphDef message of any TensorFlow, its weights Const nodes. Made with
            `graph.as_graph_def(add_shapes=True)`, it holds the static shapes that some ops can't do without.
        inputs, outputs: tensors, as "name" or "name:0", in the order of the model's own.
        names: tensor (or Const) → name in ONNX, as a plan calls it; these names are sure to last. Others are
            called as in TensorFlow, "name:0".
        kept: parameters, by their names in ONNX, that aren't computed in advance with what reads them.
        recurrent: loops that are recurrent layers.
        decode: how the values of a Const's NodeDef are read, where they aren't a plain TensorProto.
        output_names: what the outputs are called; default: as their tensors are. An output that is an input, and is
            called so, is handed out as it came.

    Returns:
        The model; tensors in TensorFlow's layouts, weights in ONNX's.

    Raises:
        ModelError: ops that ONNX has no counterpart for (all of them are named), or a tensor that isn't there.
    """
    nodes = {str(n.name): Node(n) for n in inline_calls(graph_def).node}
    ends = [tensor_name(t) for t in outputs]
    starts = [tensor_name(t) for t in inputs]
    _check(nodes, starts, ends)
    nodes = stand_ins(nodes, recurrent)
    order = _order(nodes, ends, starts)
    _refuse_unknown(order)
    builder = Builder(
        {n.name: n for n in order}, {tensor_name(k): v for k, v in (names or {}).items()}, {*starts, *ends}
    )
    graph_inputs = [_input(builder, nodes, tensor) for tensor in starts]
    for node in order:
        if node.op == "Const":
            array = node.value() if decode is None else decode(node)
            builder.constants[node.output()] = Constant(array, node.output())
    graphdef_arrays.dilated_convolutions(builder)
    fed = {t.rpartition(":")[0] for t in starts}
    for node in order:
        if node.op not in _SKIPPED and node.name not in fed and not fold(builder, node):
            HANDLERS[node.op](builder, node)
    called = output_names or [builder.name_of(tensor) for tensor in ends]
    graph_outputs = [_output(builder, t, name, graph_inputs) for t, name in zip(ends, called, strict=True)]
    used = {id(v) for node in builder.made for v in node.inputs} | {id(v) for v in graph_outputs}
    graph = ir.Graph(
        graph_inputs,
        graph_outputs,
        nodes=builder.made,
        initializers=[v for v in builder.initializers.values() if id(v) in used],
        opset_imports={"": OPSET},
        name="graphdef",
    )
    graph.meta[KEPT] = frozenset(kept)
    return ir.Model(graph, ir_version=9, producer_name="bitwright")


def _check(nodes: Mapping[str, Node], inputs: Sequence[str], outputs: Sequence[str]) -> None:
    for tensor in (*inputs, *outputs):
        if tensor.rpartition(":")[0] not in nodes:
            raise ModelError(f"the graph has no tensor {tensor!r}")
    if not outputs:
        raise ModelError("the graph has no outputs")


def _order(nodes: Mapping[str, Node], outputs: Sequence[str], inputs: Sequence[str]) -> list[Node]:
    """What the outputs depend on, producers first."""
    ends = {i.rpartition(":")[0] for i in inputs}
    order: dict[str, Node] = {}
    entered: set[str] = set()
    stack = [(o.rpartition(":")[0], False) for o in reversed(outputs)]
    stack += [(e, False) for e in ends]
    while stack:
        name, done = stack.pop()
        if done:
            order[name] = nodes[name]
            continue
        if name in entered:
            continue
        entered.add(name)
        stack.append((name, True))
        for tensor in () if name in ends else reversed(nodes[name].inputs):
            producer = tensor.rpartition(":")[0]
            if producer not in nodes:
                raise ModelError(f"node {name!r} reads {tensor!r}, which the graph doesn't have")
            if producer not in entered:
                stack.append((producer, False))
    return list(order.values())


def _refuse_unknown(order: Sequence[Node]) -> None:
    unknown: dict[str, str] = {}
    for node in order:
        if node.op not in HANDLERS and node.op not in _SKIPPED:
            unknown.setdefault(node.op, node.name)
    if unknown:
        listed = ", ".join(f"{op} ({name!r})" for op, name in sorted(unknown.items()))
        hint = ""
        if any(op.startswith(("ReadVariable", "VarHandle", "Variable", "RestoreV2")) for op in unknown):
            hint = "; freeze the graph first, so that its variables are constants"
        raise ModelError(f"these TensorFlow ops can't be written as ONNX: {listed}{hint}")


def _input(builder: Builder, nodes: Mapping[str, Node], tensor: str) -> ir.Value:
    node = nodes[tensor.rpartition(":")[0]]
    key = "dtype" if node.has("dtype") else "T"
    kind = node.dtype(key)
    shape = node.shape()
    dims = (
        None if shape is None else ir.Shape([d if d is not None else f"{node.name}_{i}" for i, d in enumerate(shape)])
    )
    value = ir.Value(name=builder.name_of(tensor), type=ir.TensorType(onnx_type(kind, model_input=True)))
    value.shape = None if dims is None else ir.Shape(dims)
    builder.values[tensor] = value
    if kind == INT32:
        builder.values[tensor] = builder.add("Cast", value, hint=node.name, to=int(ir.DataType.INT64))
    return value


def _output(builder: Builder, tensor: str, name: str, inputs: Sequence[ir.Value]) -> ir.Value:
    value = builder.value(tensor)
    if value.name == name and any(value is v for v in inputs):  # handed out as it came, under its own name
        return value
    if value.name != name or value.producer() is None:
        alias = builder.add("Identity", value, hint=tensor)
        alias.name = name
        value = alias
    return value
