"""The core's graph edits, carried out on the calls of a model in normal form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatchmethod
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright.graph import (
    LINEAR_KINDS,
    Edit,
    FoldBatchNorm,
    Op,
    OpId,
    OpKind,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
    TensorId,
    output_channels,
)
from bitwright_keras.graph.attributes import data_axis
from bitwright_keras.graph.canonical import Canonical, canonical, readers_of
from bitwright_keras.graph.constants import constant_params
from bitwright_keras.graph.model import KerasModel, Node, Ref, Spec, substitute, variables_of
from bitwright_keras.graph.native import copy_layer
from bitwright_keras.graph.params import array_of, with_values

_ACTIVATIONS = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Identity": "linear", "Softplus": "softplus", "Elu": "elu",
    "HardSwish": "hard_silu", "Mish": "mish", "Gelu": "gelu", "Swish": "silu", "Selu": "selu", "Softsign": "softsign",
    "HardSigmoid": "hard_sigmoid",
}  # fmt: skip
"""Keras activation by ONNX type."""
_ACTIVATION_KINDS = frozenset(
    {OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.IDENTITY}
)  # fmt: skip


def edit_model(model: KerasModel, edits: Sequence[Edit]) -> KerasModel:
    """A new model with the edits applied in order; layers that stay as they are are shared.

    Raises:
        ModelError: an edit names what isn't there, or would change what the model computes elsewhere.
    """
    editor = _Editor(model)
    for edit in edits:
        editor.apply(edit)
    return editor.model


class _Editor:
    def __init__(self, model: KerasModel) -> None:
        self.model = model

    @property
    def _shown(self) -> Canonical:
        return canonical(self.model)

    @singledispatchmethod
    def apply(self, edit: Edit) -> None:
        """Carry out one edit."""
        raise ModelError(f"the Keras backend has no edit {type(edit).__name__}")

    def _op(self, id: OpId) -> Op:
        return self._shown.graph.op(id)

    def _replace(self, node: Node, *others: Node) -> None:
        """Put calls in a call's place."""
        nodes = [n for old in self.model.nodes for n in (others if old is node else (old,))]
        self.model = self.model.with_(nodes=tuple(nodes))

    def _file_name(self, wanted: str) -> str:
        taken = {n.operation.name for n in self.model.nodes} | set(self.model.inputs)
        found, number = wanted, 0
        while found in taken:
            number += 1
            found = f"{wanted}_{number}"
        return found

    # -- values

    @apply.register
    def _set_params(self, edit: SetParams) -> None:
        self.model = with_values(self.model, edit.values)

    @apply.register
    def _set_bias(self, edit: SetBias) -> None:
        op = self._op(edit.op)
        if op.kind not in LINEAR_KINDS or op.weight is None:
            raise ModelError(f"{edit.op!r} is a {op.type} without a constant weight; it can't be given a bias")
        value = np.asarray(edit.value, np.float32)
        width = output_channels(op, self._shown.graph.params[op.weight].shape)
        if value.shape != (width,):
            raise ModelError(f"the bias of {edit.op!r} has shape ({width},), the new one {value.shape}")
        if not np.isfinite(value).all():
            raise ModelError(f"the new bias of {edit.op!r} holds NaN or infinity")
        node = self.model.node(edit.op)
        assert node.layer is not None
        shared = len(self.model.calls_of[id(node.layer)]) > 1
        if ParamRole.BIAS in op.params:
            if shared and "bias" in node.params:
                self._part_biases(node)
                op = self._op(edit.op)
            self.model = with_values(self.model, {op.params[ParamRole.BIAS]: value})
        elif shared:
            self._add_bias(node, value)
        else:
            layer = copy_layer(node.layer, use_bias=True)
            variables_of(layer)["bias"].assign(value)
            self._replace(node, replace(node, operation=layer, params={**node.params, "bias": _bias_id(node)}))

    def _part_biases(self, node: Node) -> None:
        """Give each call of a shared layer its own bias, as a sum with a constant; the kernel stays shared."""
        assert node.layer is not None
        bias = array_of(variables_of(node.layer)["bias"])
        layer = copy_layer(node.layer, use_bias=False)
        for call in self.model.calls_of[id(node.layer)]:
            held = {key: p for key, p in call.params.items() if key != "bias"}
            self._replace(call, plain := replace(call, operation=layer, params=held))
            self._add_bias(plain, bias)

    def _add_bias(self, node: Node, bias: NDArray[Any]) -> None:
        """The sum of a call's output and a constant takes over the output's name."""
        (output,) = node.outputs
        spec = self.model.specs[output]
        rank = len(spec.shape)
        shape = (len(bias), *(1,) * (rank - 1 - data_axis(node, rank)))
        inner = f"{output}/without_bias"
        symbol = keras.ops.add(keras.KerasTensor(spec.shape, dtype=spec.dtype), bias.reshape(shape).astype(spec.dtype))
        operation = symbol._keras_history.operation
        operation.__dict__["_inbound_nodes"] = []
        operation.name = self._file_name(f"{node.operation.name}_bias")
        name = f"{node.op}/bias"
        add = Node(name, operation, (Ref(inner), bias.reshape(shape).astype(spec.dtype)), {}, (output,))
        add = replace(constant_params(add), params={"args/1": f"{name}/constant"})
        self.model = self.model.with_(specs={**self.model.specs, inner: spec})
        self._replace(node, replace(node, outputs=(inner,)), add)

    @apply.register
    def _split_shared(self, edit: SplitSharedParam) -> None:
        op, node = self._op(edit.op), self.model.node(edit.op)
        if edit.param not in op.params.values():
            raise ModelError(f"{edit.op!r} has no parameter {edit.param!r}")
        if len(self._shown.graph.users(edit.param)) < 2 or node.layer is None:
            return
        layer = copy_layer(node.layer, name=self._file_name(node.op.replace("/", "_")))
        known = set(self._shown.graph.params)
        params = {}
        for key in node.params:
            found, number = f"{node.op}/{key}", 0
            while found in known:
                number += 1
                found = f"{node.op}/{key}_{number}"
            params[key] = found
        self._replace(node, replace(node, operation=layer, params=params))

    # -- structure

    @apply.register
    def _fold_batch_norm(self, edit: FoldBatchNorm) -> None:
        norm, into = self._op(edit.batch_norm), self._op(edit.into)
        if norm.kind is not OpKind.BATCH_NORM or into.kind not in LINEAR_KINDS:
            raise ModelError(f"{edit.batch_norm!r} ({norm.type}) can't be folded into {edit.into!r} ({into.type})")
        source = norm.data_inputs[0]
        if source == into.output:
            self._only_reader(source, edit)
            self._drop(self.model.node(norm.id))
            self._rename_output(source, norm.output)
        elif into.data_inputs[0] == norm.output:
            self._only_reader(norm.output, edit)
            self._drop(self.model.node(norm.id))
            self._rewire({norm.output: source})
        else:
            raise ModelError(f"{edit.batch_norm!r} and {edit.into!r} are not neighbours")

    def _only_reader(self, tensor: TensorId, edit: FoldBatchNorm) -> None:
        readers = readers_of(self.model).get(tensor, [])
        if len(readers) != 1 or tensor in self.model.output_ids:
            raise ModelError(
                f"{edit.batch_norm!r} can't be folded into {edit.into!r}: {tensor!r} is also read elsewhere"
            )

    def _drop(self, node: Node) -> None:
        self._replace(node)

    def _rename_output(self, tensor: TensorId, name: TensorId) -> None:
        """The call that computes `tensor` comes to compute `name`."""
        node = self.model.producers[tensor]
        outputs = tuple(name if t == tensor else t for t in node.outputs)
        specs: dict[str, Spec] = {t: s for t, s in self.model.specs.items() if t != tensor}
        specs[name] = self.model.specs[tensor]
        self._replace(node, replace(node, outputs=outputs))
        self.model = self.model.with_(specs=specs)

    def _rewire(self, tensors: dict[TensorId, TensorId]) -> None:
        nodes = tuple(node.rewired(tensors) for node in self.model.nodes)
        outputs = substitute(self.model.outputs, lambda ref: Ref(tensors.get(ref.id, ref.id)))
        specs = {t: s for t, s in self.model.specs.items() if t not in tensors}
        self.model = self.model.with_(nodes=nodes, outputs=outputs, specs=specs)

    @apply.register
    def _replace_activation(self, edit: ReplaceActivation) -> None:
        op, node = self._op(edit.op), self.model.node(edit.op)
        if op.kind not in _ACTIVATION_KINDS:
            raise ModelError(f"{edit.op!r} ({op.type}) is no activation; it can't be turned into a {edit.type}")
        dtype = self.model.specs[op.output].dtype
        if edit.type == "LeakyRelu":
            layer: keras.layers.Layer = keras.layers.LeakyReLU(0.01, name="x", dtype=dtype)
        elif edit.type in _ACTIVATIONS:
            layer = keras.layers.Activation(_ACTIVATIONS[edit.type], name="x", dtype=dtype)
        else:
            raise ModelError(
                f"{edit.op!r} can't be turned into a {edit.type!r}; possible: {', '.join([*_ACTIVATIONS, 'LeakyRelu'])}"
            )
        alone = len(self.model.calls_of[id(node.operation)]) == 1
        layer.name = node.operation.name if alone else self._file_name(node.op.replace("/", "_"))
        args = (Ref(node.inputs[0]),)
        self._replace(node, replace(node, operation=layer, args=args, kwargs={}, params={}))

    @apply.register
    def _remove_op(self, edit: RemoveOp) -> None:
        op = self._op(edit.op)
        calls = self._shown.nodes[edit.op]
        if len(op.data_inputs) != 1 or len(op.outputs) != 1 or len(calls) != 1:
            raise ModelError(f"{edit.op!r} ({op.type}) doesn't pass one input on to one output; it can't be removed")
        node, source, output = calls[0], op.data_inputs[0], op.output
        if output not in self.model.output_ids:
            self._drop(node)
            self._rewire({output: source})
        elif source in self.model.inputs or source in self.model.output_ids:
            # A model output needs a producer of its own.
            layer = keras.layers.Identity(name=node.operation.name, dtype=self.model.specs[output].dtype)
            self._replace(node, replace(node, operation=layer, args=(Ref(source),), kwargs={}, params={}))
        else:
            self._drop(node)
            readers = tuple(n.rewired({source: output}) for n in self.model.nodes)
            self.model = self.model.with_(nodes=readers)
            self._rename_output(source, output)


def _bias_id(node: Node) -> str:
    kernel = node.params["kernel"]
    return kernel.removesuffix("kernel") + "bias" if kernel.endswith("/kernel") else f"{node.op}/bias"
