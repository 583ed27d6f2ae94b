"""Cutting a model down to what lies between given tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from bitwright.backend import not_computable, require_tensors
from bitwright_onnx.graph.collector import without_collection


def values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every tensor of the main graph by name: inputs, initializers, outputs of nodes (subgraphs not included)."""
    return ir.convenience.create_value_mapping(graph, include_subgraphs=False)


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs of a control-flow node (If, Loop, Scan and custom ones)."""
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()


def captured(node: ir.Node) -> list[ir.Value]:
    """Tensors of the node's own graph that its subgraphs read without being handed them as inputs."""
    found: dict[ir.Value, None] = {}
    for body in bodies(node):
        for inner in ir.traversal.RecursiveGraphIterator(body):
            found.update((v, None) for v in inner.inputs if v is not None and v.graph is node.graph)
        found.update((v, None) for v in body.outputs if v.graph is node.graph)
    return list(found)


def reads(node: ir.Node) -> list[ir.Value]:
    """All that a node depends on: its inputs, then what its subgraphs capture."""
    return list(dict.fromkeys([*(v for v in node.inputs if v is not None), *captured(node)]))


def extract(model: ir.Model, outputs: Sequence[str], feeds: Sequence[str] | None = None) -> ir.Model:
    """A new model that computes `outputs` and holds nothing else; weights are shared with `model`, not copied.

    Args:
        outputs: names of tensors of the main graph.
        feeds: tensors that become the new model's inputs (rank and dtype kept, dimensions free);
            None: whichever of the model's own inputs the outputs depend on, in the model's order.

    Raises:
        ModelError: a name is unknown, or an output depends on a model input that isn't among the feeds.
    """
    graph = model.graph
    values = values_of(graph)
    require_tensors((*outputs, *(feeds or ())), values)
    fed = {values[name] for name in feeds or ()}
    nodes, roots = _walk([values[name] for name in outputs], fed)
    inputs = [v for v in graph.inputs if v in roots]
    if feeds is not None:
        if inputs:
            raise not_computable(outputs, feeds, (str(v.name) for v in inputs))
        inputs = [values[name] for name in feeds]
    view = ir.GraphView(
        inputs,
        [values[name] for name in outputs],
        nodes=[node for node in graph if node in nodes],
        initializers=[v for v in graph.initializers.values() if v in roots],
        opset_imports=graph.opset_imports,
        name=graph.name,
    )
    with without_collection():
        part = view.clone()
    own = set(graph.inputs)
    for original, value in zip(inputs, part.inputs, strict=True):
        value.const_value = None
        if original not in own:
            if value.dtype is None:
                value.dtype = ir.DataType.FLOAT
            if value.shape is not None:
                value.shape = ir.Shape([None] * len(value.shape))
    cut = ir.Model(part, ir_version=model.ir_version, functions=[f.clone() for f in model.functions.values()])
    cut.graph.meta.update(graph.meta)
    return cut


def _walk(targets: Iterable[ir.Value], fed: set[ir.Value]) -> tuple[set[ir.Node], set[ir.Value]]:
    """Nodes that the targets need, and the inputs and initializers at which the walk back ends."""
    nodes: set[ir.Node] = set()
    roots: set[ir.Value] = set()
    stack = list(targets)
    while stack:
        value = stack.pop()
        if value in fed:
            continue
        node = value.producer()
        if node is None:
            roots.add(value)
        elif node not in nodes:
            nodes.add(node)
            stack.extend(reads(node))
    return nodes, roots
