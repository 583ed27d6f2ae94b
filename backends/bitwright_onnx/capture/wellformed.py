"""Whether a model's nodes are what ONNX's operator schemas say, checked before anything relies on it.

ONNX Runtime refuses such models too, but only once they are compiled, and without the names that help.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import onnx
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright_onnx.graph.optable import is_default_domain
from bitwright_onnx.graph.subgraph import bodies

_OPERANDS = 4096
"""Of one node; what passes over graphs do takes time by the square of them."""
_WINDOWED = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"})


def undecoded(message: Any) -> str | None:
    """The first field of a protobuf message, or of those in it, whose text isn't UTF-8: protobuf hands out its bytes.

    Returns:
        The field's full name, such as "onnx.NodeProto.op_type"; None where all is text.
    """
    if isinstance(message, onnx.TensorProto):  # its data are bytes, and may be many
        return next((f"onnx.TensorProto.{n}" for n in ("name", "doc_string") if isinstance(getattr(message, n), bytes)),
                    next(filter(None, map(undecoded, message.external_data)), None))  # fmt: skip
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        values = (value,) if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
        if field.type == field.TYPE_STRING and any(isinstance(text, bytes) for text in values):
            return str(field.full_name)
        if field.type == field.TYPE_MESSAGE and (found := next(filter(None, map(undecoded, values)), None)):
            return found
    return None


def refuse_malformed(model: ir.Model) -> None:
    """Check operands, attributes and names of every node, those of subgraphs and functions included.

    Raises:
        ModelError: a node has too few or too many operands, an attribute that its operator doesn't have, of another
            type or of impossible values, or reads a tensor that nothing produces.
    """
    _check(model.graph, model.graph.inputs, model.graph.initializers.values(), model.opset_imports, frozenset())
    for function in model.functions.values():
        _check(function, function.inputs, (), function.opset_imports or model.opset_imports, frozenset())


def _check(
    graph: ir.Graph | ir.Function,
    inputs: Iterable[ir.Value],
    initializers: Iterable[ir.Value],
    opsets: Mapping[str, int],
    outer: Collection[ir.Value],
) -> None:
    known = {*outer, *inputs, *initializers, *(v for node in graph for v in node.outputs)}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise ModelError(
                    f"{_describe(node)} reads {value.name!r}, which is neither an input nor a weight "
                    "nor a node's output"
                )
        if max(len(node.inputs), len(node.outputs)) > _OPERANDS:
            raise ModelError(
                f"{_describe(node)} has {len(node.inputs):,} inputs and {len(node.outputs):,} outputs; {_OPERANDS:,} "
                "are possible"
            )
        schema = _schema(node, opsets)
        if schema is not None:
            _operands(node, schema)
            _attributes(node, schema)
        if is_default_domain(node):
            _values(node)
        for body in bodies(node):
            _check(body, body.inputs, body.initializers.values(), opsets, known)
    for value in graph.outputs:
        if value not in known:
            raise ModelError(f"output {value.name!r} is neither an input nor a weight nor a node's output")


def _describe(node: ir.Node) -> str:
    name = node.name or next((o.name for o in node.outputs if o.name), None)
    return f"node {name!r} ({node.op_type})"


def _schema(node: ir.Node, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    """None for operators that onnx doesn't know: custom ones, and those of opsets that are newer than it."""
    version = opsets.get(node.domain, opsets.get("ai.onnx", 0) if node.domain == "" else 0)
    if version <= 0 or node.overload or not is_default_domain(node):
        return None
    try:
        return onnx.defs.get_schema(node.op_type, min(version, onnx.defs.onnx_opset_version()), "")
    except Exception:
        return None


def _operands(node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    for what, values, least, most in (
        ("inputs", node.inputs, schema.min_input, schema.max_input),
        ("outputs", node.outputs, schema.min_output, schema.max_output),
    ):
        if not least <= len(values) <= most:
            wanted = f"{least}" if least == most else f"at least {least}" if most > 2**30 else f"{least} to {most}"
            raise ModelError(f"{_describe(node)} has {len(values)} {what}; the operator has {wanted}")
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    for value, parameter in zip(node.inputs, schema.inputs, strict=False):
        if value is None and parameter.option == single:
            raise ModelError(f"{_describe(node)} has no input {parameter.name!r}, which the operator needs")


def _attributes(node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    for name, attribute in node.attributes.items():
        wanted = schema.attributes.get(name)
        if wanted is None:
            raise ModelError(f"{_describe(node)} has an attribute {name!r}, which the operator doesn't have")
        kind: Any = wanted.type  # an enumeration that onnx's stubs don't know as one
        if int(attribute.type) != int(kind.value) and not attribute.is_ref():
            raise ModelError(
                f"attribute {name!r} of {_describe(node)} is of type {attribute.type.name}, not {kind.name}"
            )
    for name, wanted in schema.attributes.items():
        if wanted.required and name not in node.attributes:
            raise ModelError(f"{_describe(node)} has no attribute {name!r}, which the operator needs")
    if node.op_type == "Constant" and len(node.attributes) != 1:
        raise ModelError(f"{_describe(node)} has {len(node.attributes)} attributes; a constant has one, its value")


def _values(node: ir.Node) -> None:
    """Lists of numbers that must fit each other."""
    if node.op_type == "Transpose":
        order = _numbers(node, "perm")
        if order is not None and sorted(order) != list(range(len(order))):
            raise ModelError(
                f"attribute 'perm' of {_describe(node)} is {order}, which is not an order of {len(order)} axes"
            )
    elif node.op_type in _WINDOWED:
        named = {k: n for k in ("kernel_shape", "strides", "dilations") if (n := _numbers(node, k)) is not None}
        lengths: dict[str, float] = {k: len(n) for k, n in named.items()}
        if (pads := _numbers(node, "pads")) is not None:
            lengths["pads"] = len(pads) / 2
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{k} {_numbers(node, k)}" for k in lengths)
            raise ModelError(f"the attributes of {_describe(node)} are for different numbers of axes: {told}")
        for name in ("kernel_shape", "strides", "dilations"):
            if any(n < 1 for n in _numbers(node, name) or ()):
                raise ModelError(
                    f"attribute {name!r} of {_describe(node)} is {_numbers(node, name)}; it must be positive"
                )
        if node.attributes.get_int("group", 1) < 1:
            raise ModelError(f"attribute 'group' of {_describe(node)} is {node.attributes.get_int('group')}")


def _numbers(node: ir.Node, name: str) -> list[int] | None:
    attribute = node.attributes.get(name)
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.INTS:
        return None
    return [int(n) for n in attribute.as_ints()]
