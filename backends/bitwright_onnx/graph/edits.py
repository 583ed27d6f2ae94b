"""The core's graph edits, carried out on an ONNX graph."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.backend import Branch, Editor
from bitwright.errors import ModelError
from bitwright.graph import ACTIVATION_TYPES, BranchNames, Edit, Formula, Graph, Op, OpId, ParamId, TensorId, free_name
from bitwright_onnx.graph.canonical import canonical_graph
from bitwright_onnx.graph.collector import without_collection
from bitwright_onnx.graph.initializers import add_initializer, is_private, unique_name
from bitwright_onnx.graph.operands import parameters
from bitwright_onnx.graph.opset import opset_of
from bitwright_onnx.graph.optable import bias_add, linear_weight
from bitwright_onnx.graph.params import write_params
from bitwright_onnx.graph.rewrites import take_over
from bitwright_onnx.graph.subgraph import values_of
from bitwright_onnx.graph.tensors import tensor_array

_SINCE = {"HardSwish": 14, "Mish": 18, "Gelu": 20, "Swish": 2**31}
"""Opset that brought an activation; the others are older than any that models have here. No runtime has a Swish yet."""
_ATTRIBUTES: Mapping[str, Mapping[str, float]] = {"HardSigmoid": {"alpha": 1 / 6, "beta": 0.5}}


def edit_model(model: ir.Model, edits: Sequence[Edit]) -> ir.Model:
    """A new model with the edits applied in order; unchanged weights are shared with `model`.

    Raises:
        ModelError: an edit names what isn't there, or would change what the model computes elsewhere.
    """
    with without_collection():
        copy = model.clone()
    copy.graph.meta.update(model.graph.meta)
    editor = OnnxEditor(copy, canonical_graph(model))
    editor.apply_all(edits)
    editor.drop_unused()
    return copy


class OnnxEditor(Editor):
    """Edits a model in place.

    Args:
        model: to be changed.
        graph: its canonical graph.
    """

    def __init__(self, model: ir.Model, graph: Graph) -> None:
        super().__init__(graph)
        opset = opset_of(model)
        self.activations = frozenset(t for t in ACTIVATION_TYPES if _SINCE.get(t, 0) <= opset)
        self._model = model
        self._graph = model.graph
        self._nodes = {str(node.name): node for node in model.graph}
        self._released: list[ir.Value] = []
        self._spelled: list[ir.Node] = []

    def drop_unused(self) -> None:
        """Remove initializers and nodes that an edit has left without a reader."""
        for node in reversed(self._spelled):
            if node.graph is self._graph and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                self._release(node)
                self._graph.remove(node, safe=True)
        for value in self._released:
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                self._graph.initializers.pop(str(value.name), None)

    def _release(self, node: ir.Node) -> None:
        self._released += [v for v in node.inputs if v is not None and v.is_initializer()]
        self._nodes.pop(str(node.name))

    # -- values

    def set_values(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """See `Editor`."""
        write_params(self._model, values)

    def add_bias(self, op: Op, value: NDArray[np.floating]) -> ParamId:
        """See `Editor`."""
        node = self._nodes[op.id]
        weight = linear_weight(node)
        assert weight is not None
        assert weight.const_value is not None
        if node.op_type != "MatMul" and len(node.inputs) > 2 and node.inputs[2] is not None:
            raise ModelError(f"the bias of {op.id!r} is computed by the model; it can't be replaced")
        dtype = weight.const_value.dtype
        bias = self._new_bias(node, weight, value.astype(dtype.numpy()), dtype)
        if node.op_type == "MatMul":
            self._add_behind(node, bias)
        else:
            node.resize_inputs(3)
            node.replace_input_with(2, bias)
        return str(bias.name)

    def split(self, op: Op, param: ParamId) -> ParamId:
        """See `Editor`."""
        value = self._graph.initializers[param]
        assert value.const_value is not None
        array, dtype = tensor_array(value.const_value), value.const_value.dtype
        own = add_initializer(self._graph, f"{param}.{op.id}", array, dtype)
        for owner, index in parameters(self._nodes[op.id]).values():
            if owner.inputs[index] is value:
                owner.replace_input_with(index, own)
        return str(own.name)

    def is_shared(self, op: Op, param: ParamId) -> bool:
        """See `Editor`; what works on shapes and bodies of control flow are readers too."""
        return not is_private(self._graph.initializers[param])

    def _new_bias(self, node: ir.Node, weight: ir.Value, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        name = str(weight.name)
        wanted = name.removesuffix("weight") + "bias" if name.endswith("weight") else f"{node.name}.bias"
        return add_initializer(self._graph, wanted, array, dtype)

    def _add_behind(self, node: ir.Node, bias: ir.Value) -> None:
        """Put an Add behind a MatMul; the sum takes over the product's name, so that every reader sees it."""
        product = node.outputs[0]
        wanted = unique_name(self._graph, f"{product.name}/product")
        self._sum(node, bias, free_name(f"{node.name}/bias", self._nodes), wanted)

    def _sum(self, node: ir.Node, addend: ir.Value, name: str, product_name: str) -> None:
        """Put an Add behind a node; the sum takes over its output's name."""
        product = node.outputs[0]
        taken = product.name
        add = ir.node("Add", [product, addend], name=name)
        total = add.outputs[0]
        product.replace_all_uses_with(total, replace_graph_outputs=True)
        add.replace_input_with(0, product)
        total.type, total.shape = product.type, product.shape
        product.name, total.name = product_name, taken
        made = addend.producer()
        self._graph.insert_after(node if made is None else made, add)
        self._nodes[name] = add

    def names_taken(self) -> Container[OpId]:
        """See `Editor`; several nodes may be one op, which has the name of the first."""
        return self._nodes.keys() | self.ops.keys()

    def add_branch(self, op: Op, names: BranchNames, down: NDArray[np.float32], up: NDArray[np.float32]) -> Branch:
        """See `Editor`."""
        node = self._nodes[op.id]
        last, weight, source = bias_add(node) or node, linear_weight(node), node.inputs[0]
        assert weight is not None and weight.const_value is not None and source is not None
        result, dtype = last.outputs[0], weight.const_value.dtype
        product = unique_name(self._graph, f"{op.id}/product")
        behind, read = last, source
        made: list[tuple[str, str]] = []
        for name, matrix in ((names.down, down), (names.up, up)):
            held = add_initializer(self._graph, f"{name}.weight", matrix.T.astype(dtype.numpy()), dtype)
            multiplied = ir.node("MatMul", [read, held], name=name)
            read = multiplied.outputs[0]
            read.name, read.type = unique_name(self._graph, name), result.type
            if result.shape is not None:
                read.shape = ir.Shape([*result.shape[:-1], len(matrix)])
            self._graph.insert_after(behind, multiplied)
            self._nodes[name], behind = multiplied, multiplied
            made.append((str(read.name), str(held.name)))
        self._sum(last, read, names.total, product)
        (inner, first), (outer, second) = made
        return Branch(product, (inner, outer), (first, second))

    # -- structure

    def only_reader(self, tensor: TensorId, reader: Op) -> bool:
        """See `Editor`; as `is_shared`."""
        value = next(v for v in self._nodes[reader.id].inputs if v is not None and v.name == tensor)
        return not value.is_graph_output() and len(list(value.uses())) == 1

    def fold_backward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        node, other = self._nodes[norm.id], self._nodes[into.id]
        self._release(node)
        take_over(self._graph, bias_add(other) or other, node)

    def fold_forward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        node = self._nodes[norm.id]
        self._nodes[into.id].replace_input_with(0, node.inputs[0])
        self._release(node)
        self._graph.remove(node, safe=True)

    def put_activation(self, op: Op, formula: Formula) -> None:
        """See `Editor`."""
        node, source = self._nodes[op.id], values_of(self._graph)[op.data_inputs[0]]
        self._release(node)
        result = self._computed(formula, source, op.id, node)
        made = result.producer()
        assert made is not None
        take_over(self._graph, made, node)
        self._spelled.remove(made)
        del self._nodes[str(made.name)]
        made.name = op.id
        self._nodes[op.id] = made

    def _computed(self, what: Formula | float | None, source: ir.Value, name: str, before: ir.Node) -> ir.Value:
        """Put nodes that compute a formula of a tensor in front of a node."""
        if what is None:
            return source
        dtype = source.dtype or ir.DataType.FLOAT
        if not isinstance(what, Formula):
            return add_initializer(self._graph, f"{name}/constant", np.array(what, dtype.numpy()), dtype)
        clips = what.type == "Relu6"
        kind = "Clip" if clips else what.type
        inner = f"{name}/{kind}"
        operands = [self._computed(o, source, inner, before) for o in (*what.operands, *((0.0, 6.0) if clips else ()))]
        made = ir.node(kind, operands, _ATTRIBUTES.get(kind), name=free_name(inner, self._nodes))
        result = made.outputs[0]
        result.name, result.type, result.shape = unique_name(self._graph, inner), source.type, source.shape
        self._graph.insert_before(before, made)
        self._nodes[str(made.name)] = made
        self._spelled.append(made)
        return result

    def drop(self, op: Op, *, renames: bool) -> None:
        """See `Editor`."""
        node, source = self._nodes[op.id], values_of(self._graph)[op.data_inputs[0]]
        self._release(node)
        if renames:
            _give_name(self._graph, source, node)
        else:
            node.outputs[0].replace_all_uses_with(source)
            self._graph.remove(node, safe=True)


def _give_name(graph: ir.Graph, source: ir.Value, last: ir.Node) -> None:
    """As `take_over`, where the producer's output need not be its first."""
    result = last.outputs[0]
    name = result.name
    result.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(last, safe=True)
    source.name = name
