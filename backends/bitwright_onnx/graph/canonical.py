"""An ONNX model as the core's graph.

- A MatMul by a constant matrix, or by the transpose of one that other ops read too, is LINEAR; with the Add of a
  constant of its output's width (its only reader) it is one op, which has the MatMul's name and the Add's output.
- What computes shapes only (from Shape and constants) isn't shown, and reading a tensor's shape doesn't count as
  reading the tensor: neither carries data that could be quantized.
- A strided convolution with SAME padding over free dimensions has no fixed geometry; it is OPAQUE, as is every op of
  another domain. A convolution or Gemm of two activations is MATMUL, and so is a Gemm whose constant or bias has a
  form that no linear op has (transA, a computed or two-dimensional bias).
"""

from __future__ import annotations

import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright.graph import (
    KINDS,
    ActivationAttrs,
    Attrs,
    Graph,
    Op,
    OpKind,
    Param,
    ParamRole,
    RecurrentAttrs,
    Tensor,
    channel_axes,
)
from bitwright_onnx.graph import attributes
from bitwright_onnx.graph.calls import call_of
from bitwright_onnx.graph.channels import permutation, told_axes
from bitwright_onnx.graph.masking import mask_names
from bitwright_onnx.graph.operands import describe, dtype_name, is_embedding, parameters
from bitwright_onnx.graph.optable import (
    FLOAT_TYPES,
    QUANTIZED_OPS,
    bias_add,
    constant_shape,
    is_default_domain,
    is_float_constant,
    linear_weight,
    plain_bias,
    turns_weight,
)
from bitwright_onnx.graph.subgraph import captured
from bitwright_onnx.graph.value_types import is_tensor

_DEFAULT_AXIS = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1, "Concat": 0, "Split": 0, "LayerNormalization": -1}

_CANONICAL = "bitwright.canonical"
"""Key of the graph in a model's `meta`."""


def canonical_graph(model: ir.Model) -> Graph:
    """The canonical graph of a normalized model, built when it is first asked for: such a model is never changed.

    Raises:
        ModelError: the model is quantized already.
    """
    found = model.meta.get(_CANONICAL)
    if found is None:
        found = model.meta[_CANONICAL] = _build(model)  # `ir.Model.clone` leaves a model's `meta` behind
    assert isinstance(found, Graph)
    return found


def _build(model: ir.Model) -> Graph:
    refuse_quantized(model)
    hidden = shape_computations(model.graph) | {node for node in model.graph if turns_weight(node)}
    unseen = {o for node in hidden for o in node.outputs}
    masked = mask_names(model.graph)
    ops: list[Op] = []
    params: dict[str, Param] = {}
    nodes: list[ir.Node] = []
    merged: set[ir.Node] = set()
    seen: dict[ir.Value, None] = dict.fromkeys(model.graph.inputs)
    for node in model.graph:
        if node in hidden or node in merged:
            continue
        add = bias_add(node)
        if add is not None:
            merged.add(add)
        op = _op(node, add, unseen, params)
        ops.append(op)
        nodes.append(node)
        for value in (*_activations(node, unseen), *((add or node).outputs)):
            if value is not None and value.name:
                seen[value] = None
    seen.update(dict.fromkeys(model.graph.outputs))
    named = {str(v.name): v for v in seen}
    ranks = {name: None if v.shape is None else len(v.shape) for name, v in named.items()}
    pairs = list(zip(ops, nodes, strict=True))
    told = {op.id: axes for op, node in pairs if (axes := told_axes(op, node, ranks)) is not None}
    orders = {op.id: order for op, node in pairs if (order := permutation(node)) is not None}
    found = channel_axes(ops, ranks, told, orders)
    tensors = {n: Tensor(n, attributes.static_dims(v), _dtype(v), found.get(n), n in masked) for n, v in named.items()}
    return Graph(
        ops, tensors, params, [str(v.name) for v in model.graph.inputs], [str(v.name) for v in model.graph.outputs]
    )


def _dtype(value: ir.Value) -> str:
    return dtype_name(value.dtype) if is_tensor(value) else "sequence"


def refuse_quantized(model: ir.Model) -> None:
    """Quantizing twice would compound the errors unseen.

    Raises:
        ModelError: the model holds quantization ops.
    """
    for node in model.graph.all_nodes():
        if node.op_type in QUANTIZED_OPS:
            raise ModelError(
                f"the model is quantized already (node {node.name!r} is a {node.op_type}); start from the float model "
                "that it was made from, or strip its QuantizeLinear/DequantizeLinear nodes"
            )


def shape_computations(graph: ir.Graph) -> frozenset[ir.Node]:
    """Nodes that work on shapes alone: Shape and Size, and what follows from them and from constants only.

    Not the lookup of embeddings by position, nor the repetition of values for each sample (class tokens): their table
    is a parameter.
    """
    known: set[ir.Value] = set()
    hidden: set[ir.Node] = set()
    for node in graph:
        inputs = [v for v in (*node.inputs, *captured(node)) if v is not None]
        source = is_default_domain(node) and node.op_type in ("Shape", "Size")
        follows = any(v in known for v in inputs) and all(v in known or v.is_initializer() for v in inputs)
        data = is_embedding(node) or _spreads_values(node)
        if (source or (follows and not data)) and not any(o.is_graph_output() for o in node.outputs):
            hidden.add(node)
            known.update(node.outputs)
    return frozenset(hidden)


def _spreads_values(node: ir.Node) -> bool:
    """An Expand or Tile of a constant float array."""
    source = node.inputs[0] if node.inputs else None
    spreads = is_default_domain(node) and node.op_type in ("Expand", "Tile")
    return spreads and source is not None and is_float_constant(source) and len(constant_shape(source)) > 0


def _activations(node: ir.Node, unseen: set[ir.Value]) -> list[ir.Value | None]:
    """Data operands in order, then captured ones; constants and shapes left out, absent operands None."""
    operands: list[ir.Value | None] = []
    for value in (*node.inputs, *captured(node)):
        if value is None:
            operands.append(None)
        elif not value.is_initializer() and value not in unseen:
            operands.append(value)
    while operands and operands[-1] is None:
        operands.pop()
    return operands


def _op(node: ir.Node, add: ir.Node | None, unseen: set[ir.Value], params: dict[str, Param]) -> Op:
    kind, attrs = _classify(node)
    data = _activations(node, unseen)
    if kind is not OpKind.EMBEDDING and not any(data):
        kind, attrs = OpKind.OPAQUE, None  # it computes with sizes, or with constants that were too big to fold
    roles: dict[ParamRole, str] = {}
    if kind is not OpKind.OPAQUE:
        described: dict[ParamRole, Param] = {}
        for role, (owner, index) in parameters(node).items():
            value = owner.inputs[index]
            assert value is not None
            described[role] = describe(owner, role, value)
        if any(params.get(p.id, p) != p for p in described.values()):
            # One array can't be shown in two layouts (a tied matrix read once as W and once as its transpose).
            kind, attrs = OpKind.OPAQUE, None
        else:
            roles = {role: p.id for role, p in described.items()}
            params.update({p.id: p for p in described.values()})
    inputs = tuple(None if v is None else str(v.name) for v in data)
    outputs = tuple(str(o.name) for o in (add or node).outputs if o.name)
    native = node.op_type if is_default_domain(node) else f"{node.domain}.{node.op_type}"
    call = call_of(node, roles, unseen)
    return Op(str(node.name), kind, node.op_type, inputs, outputs, roles, attrs, native, call=call)


def _classify(node: ir.Node) -> tuple[OpKind, Attrs | None]:
    kind = KINDS.get(node.op_type, OpKind.OPAQUE) if is_default_domain(node) else OpKind.OPAQUE
    first = node.outputs[0] if node.outputs else None
    if first is None or (first.dtype is not None and first.dtype not in FLOAT_TYPES):
        return OpKind.OPAQUE, None
    match kind:
        case OpKind.CONV | OpKind.CONV_TRANSPOSE:
            if linear_weight(node) is None:
                return (OpKind.OPAQUE if is_float_constant(node.inputs[1]) else OpKind.MATMUL), None
            geometry = attributes.convolution(node)
            return (kind, geometry) if geometry is not None else (OpKind.OPAQUE, None)
        case OpKind.LINEAR | OpKind.MATMUL:
            return _matrix_product(node), None
        case OpKind.BATCH_NORM:
            norm = attributes.batch_norm(node)
            constant = all(is_float_constant(v) for v in node.inputs[1:5])
            return (kind, norm) if norm is not None and constant else (OpKind.OPAQUE, None)
        case OpKind.AVERAGE_POOL:
            averaged = attributes.pool(node)
            return (kind, averaged) if averaged is not None else (OpKind.ELEMENTWISE, None)
        case OpKind.PRELU:
            alpha = node.attributes.get_float("alpha", 0.01) if node.op_type == "LeakyRelu" else None
            return kind, ActivationAttrs(alpha=alpha)
        case OpKind.SOFTMAX | OpKind.CONCAT | OpKind.SPLIT | OpKind.LAYER_NORM:
            return kind, attributes.axis(node, _DEFAULT_AXIS[node.op_type])
        case OpKind.RECURRENT:
            return kind, RecurrentAttrs(tuple(i for i, o in enumerate(node.outputs) if o.name))
        case OpKind.IDENTITY if node.op_type == "Dropout" and not _inert(node):
            return OpKind.OPAQUE, None
        case OpKind.SLICE if is_embedding(node):
            return OpKind.EMBEDDING, None
    if node.op_type == "Clip":
        return attributes.clip(node)
    return kind, None


def _matrix_product(node: ir.Node) -> OpKind:
    """LINEAR with a constant weight, and a constant bias or none; else MATMUL: of activations, or of one and a
    constant that is read in another form."""
    return OpKind.LINEAR if linear_weight(node) is not None and plain_bias(node) else OpKind.MATMUL


def _inert(node: ir.Node) -> bool:
    """Whether a Dropout passes its input through: its training flag is absent or a constant false."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    flag = attributes.constant(node.inputs[2])
    return flag is not None and not bool(flag)
