"""The core's graph edits, carried out on a captured graph and its module tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatchmethod
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from bitwright.errors import ModelError
from bitwright.graph import (
    LINEAR_KINDS,
    Edit,
    FoldBatchNorm,
    Op,
    OpId,
    OpKind,
    Param,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
    output_channels,
)
from bitwright_torch.graph import modes
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.model import NAMES, CapturedModel, NodeInfo, info, owner_of, program_of, share, tensor_of
from bitwright_torch.graph.operands import Operand, operands
from bitwright_torch.graph.params import native_values, write_params

aten = torch.ops.aten
_ACTIVATIONS: dict[str, Any] = {
    "Relu": aten.relu.default, "Sigmoid": aten.sigmoid.default, "Tanh": aten.tanh.default,
    "Identity": aten.alias.default, "Softplus": aten.softplus.default, "Elu": aten.elu.default,
    "LeakyRelu": aten.leaky_relu.default, "HardSwish": aten.hardswish.default, "Mish": aten.mish.default,
    "Gelu": aten.gelu.default, "Swish": aten.silu.default,
}  # fmt: skip
"""Activations of one operand, with ONNX's default attributes."""
_ACTIVATION_KINDS = frozenset(
    {OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.IDENTITY}
)  # fmt: skip


def edit_model(model: CapturedModel, edits: Sequence[Edit]) -> CapturedModel:
    """A new model with the edits applied in order; unchanged tensors share memory with `model`'s.

    Raises:
        ModelError: an edit names what isn't there, or would change what the model computes elsewhere.
    """
    editor = _Editor(model)
    for edit in edits:
        editor.apply(edit)
    return editor.finish()


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the nodes' information."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    copied.output_node().meta = dict(graph.output_node().meta)
    return copied


class _Editor:
    def __init__(self, model: CapturedModel) -> None:
        self._program = program_of(model)
        self._shown = canonical(model)
        self._tree = share(model)
        self._graph = copy_graph(self._program.graph)
        self._known: dict[str, tuple[Operand, Param]] = dict(self._shown.params)
        self._params: dict[OpId, dict[ParamRole, str]] = {op.id: dict(op.params) for op in self._shown.graph}
        self._nodes: dict[OpId, fx.Node] = {}
        for node in self._graph.nodes:
            if node.op == "call_function" and info(node).op in self._params:
                self._nodes.setdefault(info(node).op, node)
        self._owned: set[str] = set()
        self._restructured = False

    @singledispatchmethod
    def apply(self, edit: Edit) -> None:
        """Carry out one edit."""
        raise ModelError(f"the PyTorch backend has no edit {type(edit).__name__}")

    def finish(self) -> CapturedModel:
        """The edited model."""
        if not self._restructured:
            return CapturedModel(self._tree, self._program)
        for node in reversed(list(self._graph.nodes)):
            if node.op == "get_attr" and not node.users:
                self._graph.erase_node(node)
        self._graph.lint()
        return CapturedModel(self._tree, self._program.with_graph(self._graph))

    def _op(self, id: OpId) -> Op:
        return self._shown.graph.op(id)

    def _node(self, id: OpId) -> fx.Node:
        op = self._op(id)
        if id not in self._nodes:
            raise ModelError(f"{id!r} ({op.type}) is gone, or a part of fused attention; it can't be edited")
        return self._nodes[id]

    # -- values

    @apply.register
    def _set_params(self, edit: SetParams) -> None:
        native_values(self._known, edit.values)  # all are checked before the first is changed
        for id in edit.values:
            self._make_parameter(id)
        write_params(self._tree, self._known, edit.values, self._owned)

    @apply.register
    def _set_bias(self, edit: SetBias) -> None:
        op, node = self._op(edit.op), self._node(edit.op)
        params = self._params[edit.op]
        if op.kind not in LINEAR_KINDS or ParamRole.WEIGHT not in params:
            raise ModelError(f"{edit.op!r} is a {op.type} without a constant weight; it can't be given a bias")
        value = np.asarray(edit.value)
        operand, shown = self._known[params[ParamRole.WEIGHT]]
        width = output_channels(op, shown.shape)
        if value.shape != (width,):
            raise ModelError(f"the bias of {edit.op!r} has shape ({width},), the new one {value.shape}")
        if not np.isfinite(value).all():
            raise ModelError(f"the new bias of {edit.op!r} holds NaN or infinity")
        if ParamRole.BIAS in params:
            users = [id for id, roles in self._params.items() if params[ParamRole.BIAS] in roles.values()]
            if len(users) > 1:
                self.apply(SplitSharedParam(edit.op, params[ParamRole.BIAS]))
            write_params(self._tree, self._known, {params[ParamRole.BIAS]: value}, self._owned)
            return
        weight = tensor_of(self._tree, operand.base)
        bias = torch.from_numpy(np.ascontiguousarray(value)).to(weight.device, weight.dtype)
        name = self._register(_bias_name(operand, edit.op), bias, weight.requires_grad)
        self._declare(edit.op, ParamRole.BIAS, name, bias)
        self._attach_bias(node, self._read(node, name))
        self._restructured = True

    def _make_parameter(self, id: str) -> None:
        """Put a parameter of its own in the place of one that is computed; what nothing else reads goes."""
        operand, shown = self._known[id]
        if operand.evaluator is None:
            return
        readers = [n for n, o in operands(self._graph, self._tree).items() if o.id == id and o.evaluator is not None]
        node = next(n for n in readers if not any(s in readers for s in n.all_input_nodes))
        trainable = any(tensor_of(self._tree, name).requires_grad for name in operand.evaluator.reads)
        name = self._register(id.removeprefix(self._program.prefix), operand.view(self._tree), trainable)
        read = self._read(node, name)
        read.meta[NAMES] = replace(info(read), tensor=id)
        node.replace_all_uses_with(read)
        self._known[id] = (replace(operand, base=name, evaluator=None), shown)
        self._restructured = True
        dead = [node]
        while dead:
            gone = dead.pop()
            if gone.users:
                continue
            dead += gone.all_input_nodes
            if gone.op == "get_attr":
                self._forget(gone)
            else:
                self._graph.erase_node(gone)

    def _forget(self, read: fx.Node) -> None:
        """Remove a read of a tensor that nothing else reads, and the tensor."""
        name = str(read.target)
        self._graph.erase_node(read)
        if not modes.is_flag_name(name):
            owner, last = owner_of(self._tree, name)
            # None, as for an option that a module hasn't got: its repr and others ask for the name.
            for table in (owner._parameters, owner._buffers):
                if last in table:
                    table[last] = None
            self._known.pop(self._program.prefix + name, None)

    def _attach_bias(self, node: fx.Node, bias: fx.Node) -> None:
        if node.target in (aten.matmul.default, aten.mm.default):
            # linear reads the matrix the other way round.
            with self._graph.inserting_before(node):
                weight = self._graph.call_function(aten.t.default, (node.args[1],))
            weight.meta[NAMES] = NodeInfo("", f"{info(node).op}/weight")
            node.target, node.args = aten.linear.default, (node.args[0], weight, bias)
            return
        arguments = list(node.args)
        if len(arguments) > 2:
            arguments[2] = bias
        else:
            arguments.append(bias)
        node.args = tuple(arguments)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}

    def _register(self, wanted: str, value: torch.Tensor, trainable: bool) -> str:
        """Put a new parameter into the module tree; returns its name, `wanted` if that is free."""
        path, _, last = wanted.rpartition(".")
        try:
            owner = self._tree.get_submodule(path)
        except AttributeError:
            owner, path, last = self._tree, "", wanted.replace(".", "_")
        last = "".join(c if c.isalnum() or c == "_" else "_" for c in last)
        name, number = last, 1
        while getattr(owner, name, None) is not None:
            name, number = f"{last}_{number}", number + 1
        if name in owner._parameters:
            del owner._parameters[name]
        elif name in owner.__dict__:
            del owner.__dict__[name]
        owner.register_parameter(name, nn.Parameter(value.clone(), requires_grad=trainable))
        full = f"{path}.{name}" if path else name
        self._owned.add(full)
        return full

    def _declare(self, op: OpId, role: ParamRole, name: str, value: torch.Tensor) -> None:
        dtype = str(value.dtype).removeprefix("torch.")
        shape = tuple(value.shape)
        id = self._program.prefix + name
        self._known[id] = (
            Operand(id, name, (), False, shape, dtype),
            Param(id, shape, dtype, tuple(range(len(shape)))),
        )
        self._params[op][role] = id

    def _read(self, node: fx.Node, name: str) -> fx.Node:
        """A `get_attr` of a tensor, in front of a node."""
        value = tensor_of(self._tree, name)
        with self._graph.inserting_before(node):
            read = self._graph.create_node("get_attr", name)
        dtype = str(value.dtype).removeprefix("torch.")
        id = self._program.prefix + name
        read.meta[NAMES] = NodeInfo("", id, tuple(value.shape), dtype, tuple(map(str, value.shape)))
        return read

    # -- structure

    @apply.register
    def _fold_batch_norm(self, edit: FoldBatchNorm) -> None:
        norm, into = self._node(edit.batch_norm), self._node(edit.into)
        if norm.target is not modes.batch_norm or self._op(edit.into).kind not in LINEAR_KINDS:
            raise ModelError(
                f"{edit.batch_norm!r} ({self._op(edit.batch_norm).type}) can't be folded into {edit.into!r} "
                f"({self._op(edit.into).type})"
            )
        source = norm.args[0]
        assert isinstance(source, fx.Node)
        if source is into:
            self._only_reader(source, norm, edit)
            norm.replace_all_uses_with(into)
            into.meta[NAMES] = replace(info(into), tensor=info(norm).tensor)
        elif self._data_argument(into) is norm:
            self._only_reader(norm, into, edit)
            into.replace_input_with(norm, source)
        else:
            raise ModelError(f"{edit.batch_norm!r} and {edit.into!r} are not neighbours")
        self._erase(edit.batch_norm)

    def _only_reader(self, tensor: fx.Node, reader: fx.Node, edit: FoldBatchNorm) -> None:
        if set(tensor.users) != {reader}:
            raise ModelError(
                f"{edit.batch_norm!r} can't be folded into {edit.into!r}: {info(tensor).tensor!r} is also read "
                "elsewhere"
            )

    def _data_argument(self, node: fx.Node) -> Any:
        return node.args[1] if node.target is aten.addmm.default else node.args[0]

    def _erase(self, id: OpId) -> None:
        """Remove an op that nothing reads any more, and parameters that only it read."""
        node = self._nodes.pop(id)
        read = [n for n in node.all_input_nodes if n.op == "get_attr"]
        self._graph.erase_node(node)
        del self._params[id]
        self._restructured = True
        for tensor in read:
            if not tensor.users:
                self._forget(tensor)

    @apply.register
    def _replace_activation(self, edit: ReplaceActivation) -> None:
        op, node = self._op(edit.op), self._node(edit.op)
        if op.kind not in _ACTIVATION_KINDS:
            raise ModelError(f"{edit.op!r} ({op.type}) is no activation; it can't be turned into a {edit.type}")
        if edit.type not in _ACTIVATIONS:
            raise ModelError(f"{edit.op!r} can't be turned into a {edit.type!r}; possible: {', '.join(_ACTIVATIONS)}")
        node.target, node.args, node.kwargs = _ACTIVATIONS[edit.type], (node.args[0],), {}
        self._params[edit.op] = {}
        self._restructured = True

    @apply.register
    def _remove_op(self, edit: RemoveOp) -> None:
        op, node = self._op(edit.op), self._node(edit.op)
        if len(op.data_inputs) != 1 or len(op.outputs) != 1 or info(node).shape is None:
            raise ModelError(f"{edit.op!r} ({op.type}) doesn't pass one input on to one output; it can't be removed")
        source = next(n for n in node.all_input_nodes if n.op == "placeholder" or info(n).op)
        final = self._graph.output_node()
        if final not in node.users:
            node.replace_all_uses_with(source)
            self._erase(edit.op)
        elif source.op == "placeholder" or final in source.users:
            # A model output needs a producer of its own.
            node.target, node.args, node.kwargs = aten.alias.default, (source,), {}
            self._restructured = True
        else:
            node.replace_all_uses_with(source)
            source.meta[NAMES] = replace(info(source), tensor=info(node).tensor)
            self._erase(edit.op)

    @apply.register
    def _split_shared(self, edit: SplitSharedParam) -> None:
        node = self._node(edit.op)
        roles = [role for role, id in self._params[edit.op].items() if id == edit.param]
        if not roles:
            raise ModelError(f"{edit.op!r} has no parameter {edit.param!r}")
        if sum(edit.param in held.values() for held in self._params.values()) < 2:
            return
        operand, shown = self._known[edit.param]
        readers = [
            n for n, o in operands(self._graph, self._tree).items() if o.id == edit.param and n in node.all_input_nodes
        ]
        value = operand.view(self._tree).clone()
        trainable = tensor_of(self._tree, operand.base).requires_grad
        name = self._untie(edit.op, operand, value, trainable)
        for reader in readers:
            own_node = self._read(node, name)
            if operand.transposed:
                with self._graph.inserting_before(node):
                    turned = self._graph.call_function(aten.t.default, (own_node,))
                turned.meta[NAMES] = NodeInfo("", f"{info(node).op}/{name}")
                own_node = turned
            node.replace_input_with(reader, own_node)
        id = self._program.prefix + name
        stored = Operand(id, name, (), operand.transposed, operand.shape, operand.dtype)
        self._known[id] = (stored, replace(shown, id=id))
        for role in roles:
            self._params[edit.op][role] = id
        self._restructured = True

    def _untie(self, op: OpId, operand: Operand, value: torch.Tensor, trainable: bool) -> str:
        """A tensor of its own: the layer's, if its attribute is tied to the shared one, else a new parameter."""
        shared = tensor_of(self._tree, operand.base)
        last = operand.base.rpartition(".")[2]
        layer = op.removeprefix(self._program.prefix).partition("#")[0]
        try:
            module = self._tree.get_submodule(layer)
        except AttributeError:
            module = None
        for key in () if module is None else (last, "weight", "bias"):
            name = f"{layer}.{key}"
            if (
                not operand.steps
                and name != operand.base
                and module is not None
                and module._parameters.get(key) is shared
            ):
                module._parameters[key] = nn.Parameter(value, requires_grad=trainable)
                self._owned.add(name)
                return name
        return self._register(operand.base, value, trainable)


def _bias_name(weight: Operand, op: OpId) -> str:
    whole = not weight.steps and weight.base.endswith("weight")
    return weight.base.removesuffix("weight") + "bias" if whole else f"{op}.bias"
