"""Evaluating what depends on initializers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from bitwright_onnx.graph.initializers import add_initializer, is_private, unique_name
from bitwright_onnx.graph.optable import shares_weight, turns_weight
from bitwright_onnx.graph.subgraph import bodies
from bitwright_onnx.simulate.session import compile_session

FOLD_BYTES = 2**20
"""A folded constant may be this big, or as big as the constants that it was computed from."""
_COMPUTED_BYTES = 2**27
"""All that one pass computes, on the way to folded constants too, or `_TIMES` the initializers where that is more;
nothing is computed whose size isn't known before."""
_TIMES = 8
_MULTIPLICATIONS = 2**31
"""Those of all products of one pass, or `_RANK` for each value of the initializers where that is more."""
_RANK = 64
_NOT_FOLDED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "RandomNormalLike",
                         "RandomUniformLike", "Bernoulli", "Multinomial"})  # fmt: skip
_BOUNDED = frozenset({"Cast", "Compress", "Flatten", "Identity", "NonZero", "Reshape", "Shape", "Size", "Slice",
                      "Squeeze", "Transpose", "Unique", "Unsqueeze"})  # fmt: skip
"""Ops that give no more values than they read, but for the axes of `NonZero` and `Unique`."""
_PRODUCTS = frozenset({"Attention", "AveragePool", "Conv", "ConvInteger", "ConvTranspose", "DFT", "DeformConv", "Det",
                       "Einsum", "GRU", "Gemm", "GridSample", "LRN", "LSTM", "LpPool", "MatMul", "MatMulInteger",
                       "MaxPool", "MaxRoiAlign", "NonMaxSuppression", "QLinearConv", "QLinearMatMul", "RNN", "RoiAlign",
                       "STFT"})  # fmt: skip
"""Ops that take more than a few steps for each value."""
KEPT = "bitwright.kept_parameters"
"""Metadata key of a graph: names of initializers that stay readable under their names, whatever reads them."""
_RESHAPING = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast"})


def bypass_constant_identities(graph: ir.Graph) -> None:
    """Let the readers of an Identity of an initializer read the initializer, so that weights keep their names."""
    for node in list(graph):
        if node.op_type == "Identity" and node.domain == "" and not node.outputs[0].is_graph_output():
            source = node.inputs[0]
            if source is not None and source.is_initializer():
                node.outputs[0].replace_all_uses_with(source)
                graph.remove(node, safe=True)


def cast_to_known_types(graph: ir.Graph) -> None:
    """Turn CastLike into Cast where the type is known, so that constants don't seem to depend on activations."""
    for node in graph:
        if node.domain == "" and node.op_type == "CastLike" and len(node.inputs) == 2:
            like = node.inputs[1]
            if like is not None and like.dtype is not None:
                node.op_type = "Cast"
                node.attributes.add(ir.AttrInt64("to", int(like.dtype)))
                node.resize_inputs(1)


def fold_static_shapes(graph: ir.Graph) -> bool:
    """Replace Shape and Size of tensors whose shape is fully known."""
    changed = False
    for node in list(graph):
        if node.domain != "" or node.op_type not in ("Shape", "Size") or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        if source is None or source.shape is None:
            continue
        dims = list(source.shape)
        if node.op_type == "Shape":
            start, end = (node.attributes.get_int(k, d) for k, d in (("start", 0), ("end", len(dims))))
            dims = dims[start:end]
        fixed = [d for d in dims if isinstance(d, int) and d >= 0]
        if len(fixed) != len(dims):
            continue
        array = np.array(fixed if node.op_type == "Shape" else math.prod(fixed), np.int64)
        _replace_by_constant(graph, node, array)
        changed = True
    return changed


def _constant_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes of initializers alone, as far as the size of what they give is known, and no bomb."""
    known = {v: _size(v) for v in graph.initializers.values()}
    stored = sum(size or 0 for size in known.values())
    room: float
    multiplications: float
    room, multiplications = max(_COMPUTED_BYTES, _TIMES * stored), max(_MULTIPLICATIONS, _RANK * stored // 4)
    for node in graph:
        inputs = [v for v in node.inputs if v is not None]
        plain = node.domain == "" and node.op_type not in _NOT_FOLDED and not any(bodies(node)) and not _embeds(node)
        if not (
            plain and inputs and all(v in known and v.dtype is not ir.DataType.STRING for v in inputs)
        ) or _reads_kept(node, inputs):
            continue
        if turns_weight(node) and inputs[0].is_initializer() and shares_weight(inputs[0]):
            continue  # one parameter with two uses, and no second copy
        read = sum(known[v] or 0 for v in set(inputs))
        rank = 8 if node.op_type in ("NonZero", "Unique") else 1
        most = read * rank * 2 if node.op_type in _BOUNDED else None
        sizes = [most if (size := _size(v)) is None else size for v in node.outputs]
        given = sum(math.inf if size is None else size for size in sizes)
        if given <= room and (steps := _multiplications(node, given, read)) <= multiplications:
            room, multiplications = room - given, multiplications - steps
            known.update(zip(node.outputs, sizes, strict=True))
            yield node


def _multiplications(node: ir.Node, given: float, read: int) -> float:
    """Those that a node takes at most, from the bytes that it gives and reads."""
    if node.op_type not in _PRODUCTS:
        return 0
    if node.op_type in ("MatMul", "Gemm"):
        first = node.inputs[0]
        shape = None if first is None else first.shape
        inner = None if shape is None or not len(shape) else shape[0 if node.attributes.get_int("transA", 0) else -1]
        if isinstance(inner, int):
            return given * inner // 4
    return given * read // 16


def _reads_kept(node: ir.Node, inputs: list[ir.Value]) -> bool:
    """Whether folding a node would take a parameter's name from the values that the node's readers get."""
    kept = node.graph.meta.get(KEPT, ()) if node.graph is not None else ()
    moves = node.op_type in _RESHAPING and node.op_type != "Cast"
    return any(v.name in kept and not (moves and is_private(v)) for v in inputs)


def _size(value: ir.Value) -> int | None:
    """Bytes of a tensor whose shape and type are known (a text counts as 64)."""
    if value.const_value is not None:
        return int(value.const_value.size) * _width(value.const_value.dtype)
    if value.shape is None or value.dtype is None:
        return None
    dims = [d for d in value.shape if isinstance(d, int)]
    width = _width(value.dtype)
    return math.prod(dims) * width if len(dims) == len(value.shape) else None


def _width(dtype: ir.DataType) -> int:
    return 64 if dtype is ir.DataType.STRING else max(1, dtype.bitwidth // 8)


def _embeds(node: ir.Node) -> bool:
    """Whether a node takes several rows of a table of floats: an embedding, whose table is a parameter."""
    if node.op_type != "Gather" or len(node.inputs) != 2:
        return False
    table, rows = node.inputs
    if table is None or rows is None or table.shape is None or rows.shape is None or table.dtype is None:
        return False
    return table.is_initializer() and table.dtype.is_floating_point() and len(table.shape) == 2 and len(rows.shape) > 0


def fold_constants(model: ir.Model) -> bool:
    """Evaluate what depends on initializers alone; results that would blow up the file are left to be computed."""
    graph = model.graph
    nodes = list(_constant_nodes(graph))
    inside = set(nodes)
    wanted = [
        o
        for node in nodes
        for o in node.outputs
        if not o.is_graph_output() and any(u not in inside for u in o.consumers())
    ]
    wanted = [v for v in wanted if (_size(v) or 0) <= max(FOLD_BYTES, _read(v))]
    if not wanted:
        return False
    try:
        session = compile_session(model, [str(v.name) for v in wanted], optimize=False)
        results = session.run(None, {})
    except Exception:
        # Only a convenience: what can't be folded stays in the graph and is computed there.
        return False
    changed = False
    for value, array in zip(wanted, results, strict=True):
        node = value.producer()
        assert node is not None
        if isinstance(array, np.ndarray) and array.dtype != object and array.nbytes <= max(FOLD_BYTES, _read(value)):
            if len(node.outputs) == 1:
                _replace_by_constant(graph, node, array)
            else:
                _replace_output(graph, value, array)
            changed = True
    passes.RemoveUnusedNodesPass()(model)
    return changed


def _read(value: ir.Value) -> int:
    """Bytes of the initializers that the node of a value reads."""
    node = value.producer()
    assert node is not None
    return sum(_size(v) or 0 for v in set(node.inputs) if v is not None and v.const_value is not None)


def _replace_output(graph: ir.Graph, output: ir.Value, array: np.ndarray) -> None:
    """Let an initializer take the name and the readers of one of a node's outputs; the node goes when none is read."""
    name = str(output.name)
    output.name = unique_name(graph, f"{name}.computed")
    output.replace_all_uses_with(add_initializer(graph, name, array))


def _replace_by_constant(graph: ir.Graph, node: ir.Node, array: np.ndarray) -> None:
    """Put an initializer in a node's place; a weight that was only reshaped keeps the user's name for it."""
    output = node.outputs[0]
    source = node.inputs[0]
    name = str(output.name)
    output.name = None
    if node.op_type in _RESHAPING and source is not None and source.is_initializer() and is_private(source):
        name = str(source.name)
        node.replace_input_with(0, None)
        graph.initializers.pop(name)
    value = add_initializer(graph, name, array)
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
