"""What a model computes beyond its parameters' values, as a fingerprint."""

from __future__ import annotations

import onnx_ir as ir

from bitwright.runs import fingerprint
from bitwright_onnx.graph.canonical import canonical_graph
from bitwright_onnx.graph.tensors import tensor_array


def content(model: ir.Model) -> str:
    """Hash of its nodes with their attributes and branches, of its functions, and of the initializers that no parameter
    shows."""
    shown = canonical_graph(model).params
    nodes = [_written(node) for node in model.graph]
    functions = [[str(key), [_written(node) for node in function]] for key, function in model.functions.items()]
    hidden = (
        (name, tensor_array(value.const_value))
        for name, value in sorted(model.graph.initializers.items())
        if name not in shown and value.const_value is not None
    )
    return fingerprint.of_json([nodes, functions, dict(model.opset_imports), fingerprint.of_arrays(hidden)])


def _written(node: ir.Node) -> str:
    proto = ir.serde.serialize_node(node)
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    return fingerprint.of_object(proto.SerializeToString(deterministic=True))
