"""The core's graph edits, carried out on an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatchmethod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright.graph import (
    Edit,
    FoldBatchNorm,
    OpId,
    OpKind,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
)
from bitwright_onnx.graph.initializers import add_initializer, is_private, rewrite_operand, unique_name
from bitwright_onnx.graph.operands import parameters
from bitwright_onnx.graph.opset import opset_of
from bitwright_onnx.graph.optable import KINDS, bias_add, constant_shape, is_default_domain, linear_weight, out_channels
from bitwright_onnx.graph.params import write_params
from bitwright_onnx.graph.rewrites import take_over
from bitwright_onnx.graph.tensors import tensor_array

_PLAIN_ACTIVATIONS = {"Relu": 1, "Sigmoid": 1, "Tanh": 1, "Identity": 1, "Softplus": 1, "Elu": 6, "LeakyRelu": 6,
                      "HardSigmoid": 6, "HardSwish": 14, "Mish": 18, "Gelu": 20}  # fmt: skip
"""Activations of one operand with default attributes, and the opset that brought them."""
_ACTIVATION_KINDS = frozenset({OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.IDENTITY})


def edit_model(model: ir.Model, edits: Sequence[Edit]) -> ir.Model:
    """A new model with the edits applied in order; unchanged weights are shared with `model`.

    Raises:
        ModelError: an edit names what isn't there, or would change what the model computes elsewhere.
    """
    copy = model.clone()
    copy.graph.meta.update(model.graph.meta)
    editor = Editor(copy)
    for edit in edits:
        editor.apply(edit)
    editor.drop_unused()
    return copy


class Editor:
    """Edits a model in place."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._graph = model.graph
        self._nodes = {str(node.name): node for node in model.graph}
        self._released: list[ir.Value] = []

    @singledispatchmethod
    def apply(self, edit: Edit) -> None:
        """Carry out one edit."""
        raise ModelError(f"the ONNX backend has no edit {type(edit).__name__}")

    def drop_unused(self) -> None:
        """Remove initializers that an edit has left without a reader."""
        for value in self._released:
            if value.is_initializer() and not value.uses() and not value.is_graph_output():
                self._graph.initializers.pop(str(value.name), None)

    def _node(self, id: OpId) -> ir.Node:
        try:
            return self._nodes[id]
        except KeyError:
            raise ModelError(f"the model has no op {id!r}") from None

    def _remove(self, node: ir.Node) -> None:
        self._released += [v for v in node.inputs if v is not None and v.is_initializer()]
        self._nodes.pop(str(node.name))

    @apply.register
    def _set_params(self, edit: SetParams) -> None:
        write_params(self._model, edit.values)

    @apply.register
    def _set_bias(self, edit: SetBias) -> None:
        node = self._node(edit.op)
        weight = linear_weight(node)
        if weight is None or weight.const_value is None:
            raise ModelError(f"{edit.op!r} is a {node.op_type} without a constant weight; it can't be given a bias")
        value = np.asarray(edit.value)
        width = out_channels(node, weight)
        if value.shape != (width,):
            raise ModelError(f"the bias of {edit.op!r} has shape ({width},), the new one {value.shape}")
        if not np.isfinite(value).all():
            raise ModelError(f"the new bias of {edit.op!r} holds NaN or infinity")
        dtype = weight.const_value.dtype
        native = value.astype(dtype.numpy())
        place = parameters(node).get(ParamRole.BIAS)
        if place is not None:
            owner, index = place
            old = owner.inputs[index]
            assert old is not None
            rewrite_operand(self._graph, owner, index, native.reshape(constant_shape(old)))
        elif node.op_type == "MatMul":
            self._add_behind(node, self._new_bias(node, weight, native, dtype))
        elif len(node.inputs) > 2 and node.inputs[2] is not None:
            raise ModelError(f"the bias of {edit.op!r} is computed by the model; it can't be replaced")
        else:
            node.resize_inputs(3)
            node.replace_input_with(2, self._new_bias(node, weight, native, dtype))

    def _new_bias(self, node: ir.Node, weight: ir.Value, array: NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
        name = str(weight.name)
        wanted = name.removesuffix("weight") + "bias" if name.endswith("weight") else f"{node.name}.bias"
        return add_initializer(self._graph, wanted, array, dtype)

    def _add_behind(self, node: ir.Node, bias: ir.Value) -> None:
        """Put an Add behind a MatMul; the sum takes over the product's name, so that every reader sees it."""
        product = node.outputs[0]
        name = str(product.name)
        add = ir.node("Add", [product, bias], name=self._free_node_name(f"{node.name}/bias"))
        total = add.outputs[0]
        product.replace_all_uses_with(total, replace_graph_outputs=True)
        add.replace_input_with(0, product)
        total.type, total.shape = product.type, product.shape
        product.name = unique_name(self._graph, f"{name}/product")
        total.name = name
        self._graph.insert_after(node, add)
        self._nodes[str(add.name)] = add

    def _free_node_name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._nodes:
            name, number = f"{wanted}_{number}", number + 1
        return name

    @apply.register
    def _fold_batch_norm(self, edit: FoldBatchNorm) -> None:
        norm, into = self._node(edit.batch_norm), self._node(edit.into)
        if norm.op_type != "BatchNormalization" or linear_weight(into) is None:
            raise ModelError(
                f"{edit.batch_norm!r} ({norm.op_type}) can't be folded into {edit.into!r} ({into.op_type})"
            )
        source, result = norm.inputs[0], norm.outputs[0]
        last = bias_add(into) or into
        if source is not None and source.producer() is last:
            if source.is_graph_output() or len(list(source.uses())) != 1:
                raise ModelError(
                    f"{edit.batch_norm!r} can't be folded into {edit.into!r}: {source.name!r} is also read elsewhere"
                )
            self._remove(norm)
            take_over(self._graph, last, norm)
        elif source is not None and into.inputs[0] is result:
            if result.is_graph_output() or len(list(result.uses())) != 1:
                raise ModelError(
                    f"{edit.batch_norm!r} can't be folded into {edit.into!r}: {result.name!r} is also read elsewhere"
                )
            into.replace_input_with(0, source)
            self._remove(norm)
            self._graph.remove(norm, safe=True)
        else:
            raise ModelError(f"{edit.batch_norm!r} and {edit.into!r} are not neighbours")

    @apply.register
    def _replace_activation(self, edit: ReplaceActivation) -> None:
        node = self._node(edit.op)
        if not is_default_domain(node) or KINDS.get(node.op_type) not in _ACTIVATION_KINDS:
            raise ModelError(f"{edit.op!r} ({node.op_type}) is no activation; it can't be turned into a {edit.type}")
        since = _PLAIN_ACTIVATIONS.get(edit.type)
        if since is None or since > opset_of(self._model):
            known = ", ".join(t for t, v in _PLAIN_ACTIVATIONS.items() if v <= opset_of(self._model))
            raise ModelError(f"{edit.op!r} can't be turned into a {edit.type!r}; possible here: {known}")
        new = ir.node(edit.type, [node.inputs[0]], name=node.name)
        self._graph.insert_after(node, new)
        self._remove(node)
        take_over(self._graph, new, node)
        self._nodes[str(new.name)] = new

    @apply.register
    def _remove_op(self, edit: RemoveOp) -> None:
        node = self._node(edit.op)
        data = [v for v in node.inputs if v is not None and not v.is_initializer()]
        if len(data) != 1 or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
            raise ModelError(
                f"{edit.op!r} ({node.op_type}) doesn't pass one input on to one output; it can't be removed"
            )
        source, result = data[0], node.outputs[0]
        producer = source.producer()
        if not result.is_graph_output():
            result.replace_all_uses_with(source)
            self._remove(node)
            self._graph.remove(node, safe=True)
        elif producer is None or source.is_graph_output() or producer.graph is not self._graph:
            # A model output needs a producer of its own.
            self.apply(ReplaceActivation(edit.op, "Identity")) if node.op_type != "Identity" else None
        else:
            self._remove(node)
            _give_name(self._graph, source, node)

    @apply.register
    def _split_shared(self, edit: SplitSharedParam) -> None:
        node = self._node(edit.op)
        places = [
            (n, i) for n, i in parameters(node).values() if (v := n.inputs[i]) is not None and v.name == edit.param
        ]
        if not places:
            raise ModelError(f"{edit.op!r} has no parameter {edit.param!r}")
        value = places[0][0].inputs[places[0][1]]
        assert value is not None and value.const_value is not None
        if is_private(value):
            return
        array = tensor_array(value.const_value)
        own = add_initializer(self._graph, f"{edit.param}.{edit.op}", array, value.const_value.dtype)
        for owner, index in places:
            owner.replace_input_with(index, own)


def _give_name(graph: ir.Graph, source: ir.Value, last: ir.Node) -> None:
    """As `take_over`, where the producer's output need not be its first."""
    result = last.outputs[0]
    name = result.name
    result.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(last, safe=True)
    source.name = name
