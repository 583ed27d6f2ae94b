"""What an op must have to be computed from the graph alone, by its type; and its operands in ONNX's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bitwright.graph._graph import (
    ActivationAttrs,
    AxisAttrs,
    BatchNormAttrs,
    Constant,
    ConvAttrs,
    Graph,
    Op,
    OpKind,
    ParamRole,
    PoolAttrs,
    ProductAttrs,
    TensorId,
)

R = ParamRole
_LINEAR, _NORM = {R.WEIGHT: 1, R.BIAS: 2}, {R.GAMMA: 1, R.BETA: 2}
_PLACES: Mapping[OpKind, Mapping[ParamRole, int]] = {
    OpKind.CONV: _LINEAR,
    OpKind.CONV_TRANSPOSE: _LINEAR,
    OpKind.LINEAR: _LINEAR,
    OpKind.BATCH_NORM: {R.GAMMA: 1, R.BETA: 2, R.MEAN: 3, R.VAR: 4},
    OpKind.LAYER_NORM: _NORM,
    OpKind.NORM: _NORM,
    OpKind.PRELU: {R.SLOPE: 1},
    OpKind.EMBEDDING: {R.WEIGHT: 0},
    OpKind.RECURRENT: {R.WEIGHT: 1, R.RECURRENT: 2, R.BIAS: 3},
}
"""Where ONNX's operators have their parameters."""

Operand = TensorId | ParamRole | Constant | None


def operands(op: Op) -> tuple[Operand, ...]:
    """All operands of an op in ONNX's order: activations by id, parameters by role, literals; None: absent.

    A parameter stands where its kind of op has it, or where `Call.operands` says; a constant of which nothing is said
    comes behind the activations.
    """
    given = {} if op.call is None else dict(op.call.operands)
    named = {held for held in given.values() if isinstance(held, ParamRole)}
    places = _PLACES.get(op.kind, {})
    fixed: dict[int, ParamRole | Constant] = {
        places[role]: role for role in op.params if role in places and role not in named
    }
    fixed |= given
    waiting, found = list(op.inputs), list[Operand]()
    while waiting or any(index >= len(found) for index in fixed):
        held = fixed.get(len(found))
        found.append(held if held is not None else waiting.pop(0) if waiting else None)
    return (*found, *(role for role in op.params if role not in named and role not in places))


@dataclass(frozen=True)
class Needs:
    """What an op of a type must have besides inputs and outputs.

    Attributes:
        record: the type of its `attrs`, with the fields that must be there.
        attributes: names that `call.attributes` must have.
        operands: positions that must be filled, by what stands there.
        roles: parameters.
        otherwise: what may stand in the place of all that.
    """

    record: type | None = None
    attributes: tuple[str, ...] = ()
    operands: Mapping[int, str] | None = None
    roles: tuple[ParamRole, ...] = ()
    otherwise: str = ""


_WEIGHED = ("Conv", "ConvTranspose", "Gemm")
"""Types that need a weight, unless they are products of two activations."""
_SHAPE = "the output's shape, of which one dimension at most is free"
_WINDOW = "`kernel_shape` (and `strides`, `pads`, …) in `call.attributes`"
_AXES = "`PoolAttrs.axes`"

NEEDS: Mapping[str, Needs] = {
    "Conv": Needs(ConvAttrs, roles=(R.WEIGHT,)),
    "ConvTranspose": Needs(ConvAttrs, roles=(R.WEIGHT,)),
    "Gemm": Needs(roles=(R.WEIGHT,)),
    "BatchNormalization": Needs(BatchNormAttrs, roles=(R.MEAN, R.VAR)),
    "LayerNormalization": Needs(AxisAttrs, ("epsilon",)),
    "RMSNormalization": Needs(attributes=("axis", "epsilon")),
    "InstanceNormalization": Needs(attributes=("epsilon",)),
    "GroupNormalization": Needs(attributes=("num_groups", "epsilon")),
    "LpNormalization": Needs(attributes=("axis", "p")),
    "Clip": Needs(ActivationAttrs),
    "LeakyRelu": Needs(ActivationAttrs),
    "PRelu": Needs(roles=(R.SLOPE,)),
    "Softmax": Needs(AxisAttrs),
    "LogSoftmax": Needs(AxisAttrs),
    "Concat": Needs(AxisAttrs),
    "Split": Needs(AxisAttrs),
    "Einsum": Needs(attributes=("equation",)),
    "AveragePool": Needs(PoolAttrs, otherwise=_WINDOW),
    "MaxPool": Needs(PoolAttrs, otherwise=_WINDOW),
    "GlobalAveragePool": Needs(PoolAttrs),
    "GlobalMaxPool": Needs(PoolAttrs, otherwise="a `call`, where axes are those behind axis 1; operand 1: axes"),
    **dict.fromkeys(
        ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
         "ReduceLogSumExp", "ReduceSumSquare"),
        Needs(attributes=("keepdims",), otherwise=f"{_AXES} and `PoolAttrs.keepdims`"),
    ),
    "Transpose": Needs(attributes=("perm",)),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), Needs(operands={1: "shape"}, otherwise=_SHAPE)),
    "Expand": Needs(operands={1: "shape"}),
    "Tile": Needs(operands={1: "repeats"}),
    "DepthToSpace": Needs(attributes=("blocksize", "mode")),
    "SpaceToDepth": Needs(attributes=("blocksize",)),
    "Slice": Needs(operands={1: "starts", 2: "ends"}),
    "Gather": Needs(operands={0: "data", 1: "indices"}),
    "GatherElements": Needs(operands={1: "indices"}),
    "GatherND": Needs(operands={1: "indices"}),
    "Pad": Needs(attributes=("mode",), operands={1: "pads"}),
    "Resize": Needs(attributes=("mode", "coordinate_transformation_mode"), operands={2: "scales"},
                    otherwise="operand 3, sizes"),
    "CumSum": Needs(operands={1: "axis"}),
    "TopK": Needs(operands={1: "k"}),
    "Where": Needs(operands={1: "x", 2: "y"}),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), Needs(attributes=("hidden_size",), roles=(R.WEIGHT, R.RECURRENT))),
}  # fmt: skip
"""By type; the types that aren't here need nothing but their operands."""


_GIVEN: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNormalization", "Clip"), (1, 2)),
    **dict.fromkeys(("RMSNormalization", "PRelu"), (1,)),
    "BatchNormalization": (1, 2, 3, 4),
    "Resize": (1, 2, 3),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2, 3)),
}
"""Where ops have parameters or literals as a rule."""


def on_tensors(op: Op) -> bool:
    """Whether a tensor stands where ops of the type have a parameter or a literal: then it is ONNX's operator with
    these operands, and its call says the rest."""
    held = operands(op)
    places = _GIVEN.get(op.type, ()) if op.call is not None else ()
    return any(i < len(held) and held[i] is not None and not isinstance(held[i], ParamRole | Constant) for i in places)


def as_called(op: Op) -> Op:
    """The op with the type that its call gives it."""
    return op if op.call is None or not op.call.type else replace(op, type=op.call.type)


def lacking(op: Op, graph: Graph) -> str | None:
    """What an op lacks to be computed from its graph (see `NEEDS`); None where it has all.

    An OPAQUE op computes what its type says only where it has a `Call`.
    """
    op = as_called(op)
    if op.kind is OpKind.OPAQUE and op.call is None:
        return f"its backend doesn't say what it computes ({op.native or op.type})"
    if op.kind is OpKind.MATMUL and op.type in _WEIGHED:
        return None if op.call is not None else f"its backend doesn't say how it multiplies ({op.native or op.type})"
    if isinstance(op.attrs, ProductAttrs) and op.attrs.transposed is None and op.type == "MatMul":
        return "it contracts other axes than a matrix product"
    needs = NEEDS.get(op.type)
    if op.type == "MatMul" and op.kind is OpKind.LINEAR:
        needs = NEEDS["Gemm"]
    if needs is None or on_tensors(op) or _otherwise(op, graph):
        return None
    attributes = op.call.attributes if op.call is not None else {}
    missing = [f"parameter {role.value}" for role in needs.roles if role not in op.params]
    if needs.record is not None and not isinstance(op.attrs, needs.record) and not _in_call(op, needs.record):
        missing.append(needs.record.__name__)
    elif op.type in ("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool") and not _pooled(op):
        missing.append("window, no axes")
    missing += [f"`{name}`" for name in needs.attributes if name not in attributes]
    held = operands(op)
    missing += [
        f"{what} (operand {i})"
        for i, what in (needs.operands or {}).items()
        if (held[i] if i < len(held) else None) is None
    ]
    return f"it has no {', no '.join(missing)}" if missing else None


def _in_call(op: Op, record: type) -> bool:
    """Whether the call says what a record would."""
    if op.call is None:
        return False
    if record is AxisAttrs:
        return "axis" in op.call.attributes
    return record is ActivationAttrs and op.type == "Clip" and bool(op.call.operands)


def _pooled(op: Op) -> bool:
    """Whether the attributes of a pooling say over what."""
    return isinstance(op.attrs, PoolAttrs) and (op.attrs.window is not None or bool(op.attrs.axes))


def _otherwise(op: Op, graph: Graph) -> bool:
    attributes = op.call.attributes if op.call is not None else {}
    if op.type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        shape = graph.tensors[op.output].shape
        return shape is not None and shape.count(None) <= 1
    if op.type in ("AveragePool", "MaxPool"):
        return "kernel_shape" in attributes or _pooled(op)
    if op.type == "GlobalMaxPool":
        return _pooled(op) or op.call is not None or operands(op)[1:] not in ((), (None,))
    if op.type.startswith("Reduce"):
        return isinstance(op.attrs, PoolAttrs) and bool(op.attrs.axes)
    if op.type == "Resize":
        held = operands(op)
        return len(held) > 3 and held[3] is not None and {"mode", "coordinate_transformation_mode"} <= set(attributes)
    return False
