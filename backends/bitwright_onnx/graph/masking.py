"""An ONNX graph's nodes as `bitwright.placement._masks` reads them."""

from __future__ import annotations

import onnx_ir as ir

from bitwright.graph import KINDS, OpKind
from bitwright.placement import UNREAD, Extent, NodeView, masks
from bitwright_onnx.graph.attributes import constant
from bitwright_onnx.graph.optable import FLOAT_TYPES, is_default_domain, is_float_constant


def mask_names(graph: ir.Graph) -> frozenset[str]:
    """Names of the values that are masks or masked (see `bitwright.placement._masks`)."""
    steps: list[NodeView] = []
    constants: dict[str, Extent] = {}
    tables: dict[str, Extent] = {}
    dtypes: dict[str, ir.DataType | None] = {str(v.name): v.dtype for v in graph.inputs}
    for node in graph:
        kind = KINDS.get(node.op_type, OpKind.OPAQUE) if is_default_domain(node) else OpKind.OPAQUE
        names = [str(v.name) for v in node.inputs if v is not None]
        if kind not in UNREAD:
            read = tables if _is_lookup(node) else constants
            for value in node.inputs:
                if value is not None and is_float_constant(value) and str(value.name) not in read:
                    array = constant(value)
                    assert array is not None
                    read[str(value.name)] = Extent.of_table(array) if read is tables else Extent.of(array)
        filled = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
        if filled is not None:
            names.append(f"{node.name}\0value")
            constants[names[-1]] = Extent.of(filled.as_tensor().numpy())
        outputs = [o for o in node.outputs if o.name]
        dtypes.update({str(o.name): o.dtype for o in outputs})
        steps.append(NodeView(kind, node.op_type, tuple(names), tuple(str(o.name) for o in outputs)))
    return masks(
        steps,
        [str(v.name) for v in graph.inputs],
        [str(v.name) for v in graph.outputs],
        {**tables, **constants},
        lambda name: name in dtypes and (dtypes[name] is None or dtypes[name] in FLOAT_TYPES),
    )


def _is_lookup(node: ir.Node) -> bool:
    """Whether an op takes rows of a table; output layers that share one of words read it turned."""
    return node.op_type in ("Gather", "GatherND", "GatherElements", "Transpose")
