"""Sequences and optionals: values whose types ONNX's inference knows and onnx-ir's merge loses."""

from __future__ import annotations

import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright_onnx.graph.subgraph import bodies

_MAKERS = frozenset(
    {"SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SplitToSequence", "SequenceMap"}
)


def is_tensor(value: ir.Value | None) -> bool:
    """Whether a value is a tensor (or of unknown type, which is taken for one)."""
    return value is None or value.type is None or isinstance(value.type, ir.TensorType | ir.SparseTensorType)


def refuse_no_tensors(graph: ir.Graph) -> None:
    """Only tensors can be fed, handed out and compared.

    Raises:
        ModelError: an input or an output of the model is something else.
    """
    for what, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            if not is_tensor(value):
                kind = "an optional value" if isinstance(value.type, ir.OptionalType) else "a sequence of tensors"
                raise ModelError(
                    f"{what} {value.name!r} is {kind}; only tensors can be fed and compared. Cut the model so that "
                    "its inputs and outputs are tensors; inside, sequences may stand"
                )


def restore_types(graph: ir.Graph | ir.Function) -> None:
    """Give outputs of sequence and optional ops their types again; they pass through Identity and control flow."""
    for node in graph:
        for body in bodies(node):
            if node.op_type == "Loop":
                # The body's first two inputs are the iteration and the condition, as are the node's.
                _pass_on(list(node.inputs), list(body.inputs))
            restore_types(body)
        for index, output in enumerate(node.outputs):
            made = _type_of(node, index)
            if made is not None:
                output.type = made
                output.shape = None


def _pass_on(sources: list[ir.Value | None], targets: list[ir.Value]) -> None:
    for source, target in zip(sources, targets, strict=False):
        if source is not None and not is_tensor(source):
            target.type, target.shape = source.type, None


def _type_of(node: ir.Node, index: int) -> ir.TypeProtocol | None:
    """The type of an output that is not a tensor; None for tensors."""
    if node.domain not in ("", "ai.onnx"):
        return None
    source = node.inputs[0] if node.inputs else None
    output = node.outputs[index]
    if node.op_type in _MAKERS:
        dtype = output.dtype or (source.dtype if source is not None else None) or ir.DataType.FLOAT
        return ir.SequenceType(ir.TensorType(dtype))
    if node.op_type == "Optional":
        inner = source.type if source is not None and source.type is not None else ir.TensorType(ir.DataType.FLOAT)
        return ir.OptionalType(inner)
    if node.op_type == "OptionalGetElement" and source is not None and isinstance(source.type, ir.OptionalType):
        inner = source.type.elem_type
        return inner if not isinstance(inner, ir.TensorType) else None
    if node.op_type == "Identity" and not is_tensor(source):
        assert source is not None
        return source.type
    if node.op_type in ("If", "Loop"):
        # A loop's body gives its condition first.
        inside = [b.outputs[index + (node.op_type == "Loop")] for b in bodies(node) if len(b.outputs) > index]
        return next((v.type for v in inside if v.type is not None and not is_tensor(v)), None)
    return None
