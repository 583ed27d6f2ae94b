"""A canonical graph with its parameters as an ONNX model.

Tensors and parameters keep their names, so that encodings find each on exactly one ONNX value. What passes its input
on (Identity, Dropout) is no node of the model: such a tensor goes by the name of the one that it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright.graph import ONNX_TYPES, Graph, Op, OpKind, ParamId, TensorId, as_called, lacking, on_tensors
from bitwright_onnx.capture.folding import KEPT
from bitwright_onnx.emit import elementwise, norms, products, recurrent, shapes
from bitwright_onnx.emit.sheet import NotEmittable, Sheet, onnx_type
from bitwright_onnx.emit.spelled import SPELLED, square

OPSET = 20
"""What runtimes of some years know."""
_CPP = {"float32": "float", "float64": "double"}
"""What ONNX's schemas call types."""
_PER_CHANNEL = {"GroupNormalization": 21}
"""Opsets from which operators take what the canonical ops have."""

Writer = Callable[[Sheet, Op], ir.Value | list[ir.Value]]

_BY_KIND: Mapping[OpKind, Writer] = {
    OpKind.CONV: products.convolution,
    OpKind.CONV_TRANSPOSE: products.convolution,
    OpKind.LINEAR: products.linear,
    OpKind.EMBEDDING: products.embedding,
    OpKind.BATCH_NORM: norms.batch_norm,
    OpKind.IDENTITY: elementwise.identity,
    OpKind.RECURRENT: products.recurrent,
}
_BY_TYPE: Mapping[str, Writer] = {
    "MatMul": products.product,
    "ConvOfTensors": products.convolution_of_tensors,
    "LayerNormalization": norms.layer_norm,
    "RMSNormalization": norms.rms_norm,
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization"), norms.group_norm),
    "LpNormalization": norms.lp_norm,
    "Clip": elementwise.clip,
    "LeakyRelu": elementwise.leaky_relu,
    "PRelu": elementwise.prelu,
    "Swish": elementwise.swish,
    "Cast": elementwise.cast,
    "OneHot": elementwise.one_hot,
    "Concat": elementwise.concat,
    "Split": elementwise.split_sizes,
    **dict.fromkeys(("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"), shapes.pool),
    **dict.fromkeys(
        ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
         "ReduceLogSumExp", "ReduceSumSquare"),
        shapes.reduction,
    ),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), shapes.reshape),
    "Transpose": shapes.transpose,
    "Slice": shapes.part,
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), shapes.blocks),
    "Resize": shapes.resize,
    "Recurrent": recurrent.layer,
    **SPELLED,
}  # fmt: skip
"""What writes an op, by its kind or else by its type; other operators of ONNX are written as they stand."""

_OF_ONE = {
    products.convolution, products.linear, norms.batch_norm, norms.layer_norm, norms.rms_norm, norms.group_norm,
    norms.lp_norm, elementwise.leaky_relu, elementwise.prelu, elementwise.swish, square, elementwise.cast,
    elementwise.identity, shapes.pool, shapes.transpose, shapes.blocks,
}  # fmt: skip
"""Writers of functions of one tensor."""


@dataclass(frozen=True)
class Emitted:
    """A written graph.

    Attributes:
        model: the ONNX model.
        names: tensor → its name in the model, where that isn't its own.
    """

    model: ir.Model
    names: Mapping[TensorId, str] = field(default_factory=dict)


def refusals(graph: Graph) -> Iterator[tuple[str, str, str]]:
    """The ops that can't be written: id, type and reason."""
    for op in graph:
        reason = _refusal(op, graph)
        if reason is not None:
            yield op.id, op.type, reason


def _refusal(op: Op, graph: Graph) -> str | None:
    if (reason := lacking(op, graph)) is not None:
        return reason
    op = as_called(op)
    if op.kind in _BY_KIND or op.type in _BY_TYPE:
        return None
    return None if op.type in ONNX_TYPES else f"ONNX has no operator {op.type}"


def emit(graph: Graph, params: Callable[[ParamId], NDArray[Any]] | Mapping[ParamId, NDArray[Any]]) -> Emitted:
    """Write a graph.

    Args:
        graph: canonical, complete as `bitwright.graph.NEEDS` says.
        params: values in canonical layout, or what hands them out by id.

    Raises:
        NotEmittable: ops that can't be written; all that are known beforehand are named.
        ModelError: a tensor and a parameter share a name.
    """
    if refused := list(refusals(graph)):
        raise NotEmittable(*refused[0], refused[1:])
    if clash := sorted(set(graph.tensors) & set(graph.params)):
        raise ModelError(f"{clash[0]!r} names a tensor and a parameter; in an ONNX model a name means one thing")
    sheet = Sheet(graph, params.__getitem__ if isinstance(params, Mapping) else params)
    names: dict[TensorId, str] = {}
    inputs = [_input(sheet, tensor) for tensor in graph.inputs]
    for op in map(as_called, graph):
        writer = _BY_KIND.get(op.kind) or _BY_TYPE.get(op.type) or elementwise.plain
        if writer in _OF_ONE and op.call is not None and (on_tensors(op) or len(op.outputs) > 1):
            writer = elementwise.plain
        if writer in _OF_ONE and len(op.data_inputs) != 1:
            raise NotEmittable(op.id, op.type, "it reads other tensors than one")
        written = writer(sheet, op)
        values = written if isinstance(written, list) else [written]
        if len(values) != len(op.outputs):
            raise NotEmittable(op.id, op.type, f"it has {len(op.outputs)} outputs")
        for tensor, value in zip(op.outputs, values, strict=True):
            _name(sheet, op, tensor, value, names)
    outputs = [sheet.values[t] for t in graph.outputs]
    for tensor, value in zip(graph.outputs, outputs, strict=True):
        about = graph.tensors[tensor]
        value.type = ir.TensorType(onnx_type(about.dtype))
        value.shape = None if about.shape is None else ir.Shape(list(about.shape))
    opset = _opset(sheet)
    made = ir.Graph(
        inputs,
        outputs,
        nodes=sheet.nodes,
        initializers=list(sheet.initializers.values()),
        opset_imports={"": opset},
        name="bitwright",
    )
    made.meta[KEPT] = frozenset(graph.params)
    version = max(9, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)], ignore_unknown=True))
    return Emitted(ir.Model(made, ir_version=version, producer_name="bitwright"), names)


def _opset(sheet: Sheet) -> int:
    """The opset of a model: that of runtimes of some years, or the first that has its operators as they are used."""
    return max([OPSET, *(_since(node, sheet) for node in sheet.nodes)])


def _since(node: ir.Node, sheet: Sheet) -> int:
    if onnx.defs.has(node.op_type, OPSET, "") and _fits(node, onnx.defs.get_schema(node.op_type, OPSET), sheet):
        return _PER_CHANNEL.get(node.op_type, OPSET)
    later = [s.since_version for s in _history()[node.op_type] if s.since_version > OPSET and _fits(node, s, sheet)]
    return min(later, default=OPSET)  # the checker says what no version has


def _fits(node: ir.Node, schema: onnx.defs.OpSchema, sheet: Sheet) -> bool:
    """Whether a version of an operator has a node's attributes, as many operands, and these types of tensors."""
    if not set(node.attributes) <= set(schema.attributes) or len(node.inputs) > schema.max_input:
        return False
    for value, formal in zip(node.inputs, schema.inputs, strict=False):
        about = None if value is None else sheet.graph.tensors.get(str(value.name))
        if about is not None and f"tensor({_CPP.get(about.dtype, about.dtype)})" not in formal.types:
            return False
    return True


@cache
def _history() -> Mapping[str, Sequence[onnx.defs.OpSchema]]:
    found: dict[str, list[onnx.defs.OpSchema]] = defaultdict(list)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            found[schema.name].append(schema)
    return found


def _input(sheet: Sheet, tensor: TensorId) -> ir.Value:
    about = sheet.graph.tensors[tensor]
    value = ir.Value(name=tensor, type=ir.TensorType(onnx_type(about.dtype)))
    if about.shape is not None:
        value.shape = ir.Shape([f"{tensor}_{i}" if n is None else n for i, n in enumerate(about.shape)])
    sheet.values[tensor] = value
    return value


def _name(sheet: Sheet, op: Op, tensor: TensorId, value: ir.Value, names: dict[TensorId, str]) -> None:
    """Call what an op computes by the name of its tensor; what is another tensor's value already keeps its name."""
    given = value.name in sheet.graph.tensors or value.producer() is None
    if given and tensor in sheet.graph.outputs:
        value, given = sheet.node(op, "Identity", value), False
    if given:
        names[tensor] = str(value.name)
    else:
        value.name = tensor
        sheet.main(op, value)
    sheet.values[tensor] = value


def values_equal(expected: NDArray[Any], found: NDArray[Any], *, halves: bool = False) -> bool:
    """Whether two arrays are one tensor's, but for the rounding of floats: a noise of 90 dB below the signal.

    Args:
        expected, found: of the framework, and of ONNX Runtime.
        halves: some were computed in 16 bits, between whose casts runtimes compute in float32: 60 dB.
    """
    if np.shape(expected) != np.shape(found):
        return False
    if np.asarray(expected).dtype.kind != "f":
        return bool(np.array_equal(expected, found))
    a, b = (np.asarray(x, np.float64) for x in (expected, found))
    apart = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    if not np.isfinite(a[apart]).all() or not np.isfinite(b[apart]).all():
        return False
    whole = float(np.square(a[np.isfinite(a)]).sum())
    noise = 1e-6 if halves else 1e-9
    return float(np.square(a[apart] - b[apart]).sum()) <= noise * whole + 1e-24 * a.size
