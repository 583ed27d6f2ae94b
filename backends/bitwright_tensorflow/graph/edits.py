"""The core's graph edits, carried out on a GraphDef.

Names stay: what an edit puts in takes the name of the node whose tensor it now computes, and the node that it
replaces moves aside. Nodes that training still reads (gradients, optimizers, savers) are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatchmethod

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import ModelError
from bitwright.graph import (
    LINEAR_KINDS,
    ConvAttrs,
    Edit,
    FoldBatchNorm,
    OpId,
    OpKind,
    ParamId,
    ParamRole,
    RemoveOp,
    ReplaceActivation,
    SetBias,
    SetParams,
    SplitSharedParam,
)
from bitwright_tensorflow.graph import rewriter
from bitwright_tensorflow.graph.canonical import Canonical, recognize
from bitwright_tensorflow.graph.forms import Form
from bitwright_tensorflow.graph.found import Found
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.linear_ops import ADDS
from bitwright_tensorflow.graph.model import Array, Kind, TfModel, array_of, node_of, operand_of
from bitwright_tensorflow.graph.network import ALIAS, OP_NAME, Read
from bitwright_tensorflow.graph.params import checked_native, numpy_dtype
from bitwright_tensorflow.graph.rewriter import Rewriter

_ACTIVATIONS = {"Relu": "Relu", "Sigmoid": "Sigmoid", "Tanh": "Tanh", "Identity": "Identity", "Softplus": "Softplus",
                "Elu": "Elu", "Selu": "Selu", "Softsign": "Softsign"}  # fmt: skip
_ACTIVATION_KINDS = frozenset({OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.IDENTITY})


def edit_model(model: TfModel, edits: Sequence[Edit]) -> TfModel:
    """A new model with the edits applied in order; unchanged values are shared with `model`.

    Raises:
        ModelError: an edit names what isn't there, or would change what the model computes elsewhere.
    """
    editor = Editor(model)
    for edit in edits:
        editor.apply(edit)
    return editor.finish()


class Editor:
    """Applies edits to a copy of a model's graph; keeps track of what became of each op in the meantime."""

    def __init__(self, model: TfModel) -> None:
        self._model = model
        known: Canonical = recognize(model)
        self._net = known.network
        self._ops: dict[OpId, Found] = dict(known.ops)
        self._params: dict[ParamId, Read] = dict(known.params)
        self._users = {p: [op.id for op in known.graph.users(p)] for p in known.graph.params}
        self._values: dict[str, Array] = dict(model.values)
        self._lazy: Rewriter | None = None

    @property
    def _graph(self) -> Rewriter:
        """The copy; made when an edit first changes the structure or a constant."""
        if self._lazy is None:
            kept = {node_of(t) for t in (*self._model.inputs, *self._model.outputs)}
            if self._model.kind is Kind.SESSION:
                # Collections, savers and the user's own code name nodes that no node reads.
                kept |= {n.name for n in self._model.graph_def.node}
            self._lazy = Rewriter(self._model.copy_meta(), kept)
        return self._lazy

    def finish(self) -> TfModel:
        """The edited model."""
        if self._lazy is None:
            return self._model.with_values(self._values)
        nodes = self._lazy.nodes
        values = {name: value for name, value in self._values.items() if name in nodes}
        return self._model.with_meta(self._lazy.finish(), values)

    @singledispatchmethod
    def apply(self, edit: Edit) -> None:
        """Carry out one edit."""
        raise ModelError(f"the TensorFlow backend has no edit {type(edit).__name__}")

    def _op(self, id: OpId) -> Found:
        try:
            return self._ops[id]
        except KeyError:
            raise ModelError(f"the model has no op {id!r}") from None

    def _linear(self, id: OpId, what: str) -> Found:
        found = self._op(id)
        if found.kind not in LINEAR_KINDS or ParamRole.WEIGHT not in found.reads:
            raise ModelError(f"{id!r} is a {found.native} without a weight of its own; {what}")
        return found

    # -- values

    @apply.register
    def _set_params(self, edit: SetParams) -> None:
        new: dict[str, tuple[Array, str]] = {}
        for id, value in edit.values.items():
            if id not in self._params:
                raise ModelError(f"the model has no parameter {id!r}")
            read = self._params[id]
            new[read.source] = checked_native(read, value, id), read.dtype
        for source, (array, dtype) in new.items():
            self._store(source, array, dtype)

    def _store(self, source: str, array: Array, dtype: str) -> None:
        if source in self._values:
            self._values[source] = array
        else:
            old = self._graph.nodes[source]
            fresh = rewriter.constant(source, array, dtype)
            old.attr["value"].CopyFrom(fresh.attr["value"])

    def _value(self, source: str) -> Array:
        if source in self._values:
            return self._values[source]
        nodes = self._lazy.nodes if self._lazy is not None else self._net.inference.wiring.nodes
        return array_of(nodes[source].attr["value"].tensor)

    def _new_param(self, wanted: str, like: str, native: Array, dtype: str) -> tuple[str, str]:
        """A parameter of the same sort as `like` (variable or constant): its node, and the tensor with its value."""
        name = self._graph.free(wanted)
        if like not in self._values:
            self._graph.add(rewriter.constant(name, native, dtype))
            return name, f"{name}:0"
        self._values[name] = native
        if self._model.kind is Kind.SESSION:
            nodes, definition, read = rewriter.declared_variable(name, native, dtype)
            for node in nodes:
                self._graph.add(node)
            for key in ("variables", "trainable_variables"):
                self._graph.meta.collection_def[key].bytes_list.value.append(definition)
            self._graph.protected.add(name)
            return name, read
        for node in rewriter.variable(name, native, dtype):
            self._graph.add(node)
        return name, f"{name}/Read/ReadVariableOp:0"

    # -- biases

    @apply.register
    def _set_bias(self, edit: SetBias) -> None:
        found = self._linear(edit.op, "it can't be given a bias")
        value = np.asarray(edit.value)
        width = _width(found)
        if value.shape != (width,):
            raise ModelError(f"the bias of {edit.op!r} has shape ({width},), the new one {value.shape}")
        if not np.isfinite(value).all():
            raise ModelError(f"the new bias of {edit.op!r} holds NaN or infinity")
        bias = found.reads.get(ParamRole.BIAS)
        if bias is None:
            self._add_bias(found, value)
        elif self._is_shared(bias.source):
            self._give_own(found, ParamRole.BIAS, value)
        else:
            self._store(bias.source, checked_native(bias, value, bias.source), bias.dtype)

    def _is_shared(self, param: ParamId) -> bool:
        return len(self._users.get(param, ())) > 1

    def _add_bias(self, found: Found, value: NDArray[np.floating]) -> None:
        weight = found.reads[ParamRole.WEIGHT]
        native = value.astype(numpy_dtype(weight.dtype))
        source, tensor = self._new_param(_bias_name(weight.source, found.id), weight.source, native, weight.dtype)
        name = found.end
        end = self._graph.nodes[name]
        data_format = self._data_format(found)
        if ALIAS in end.attr:
            # An Identity that a fold has put there for the name's sake becomes the sum.
            self._graph.put(rewriter.bias_add(name, end.input[0], tensor, weight.dtype, data_format))
            inner = found.nodes
        else:
            moved = self._graph.move_aside(name, "product")
            if found.id == name:
                self._graph.nodes[moved].attr[OP_NAME].s = found.id.encode()
            self._graph.add(rewriter.bias_add(name, f"{moved}:0", tensor, weight.dtype, data_format))
            inner = (*found.nodes[:-1], moved, name)
        read = Read(source, (name, 1), tensor, Form(native.shape), weight.dtype)
        self._params[source] = read
        self._users[source] = [found.id]
        self._ops[found.id] = replace(found, nodes=inner, reads={**found.reads, ParamRole.BIAS: read})

    def _data_format(self, found: Found) -> str:
        output = found.outputs[0]
        rank = self._rank(found)
        axis = found.channels.get(output, -1)
        return "NCHW" if axis == 1 and rank is not None and rank > 2 else "NHWC"

    def _rank(self, found: Found) -> int | None:
        for tensor in (found.outputs[0], *(f"{n}:0" for n in found.nodes)):
            if self._net.inference_has(tensor):
                return self._net.rank(tensor)
        return None

    def _give_own(self, found: Found, role: ParamRole, value: NDArray[np.floating] | None) -> None:
        """A copy of a shared parameter for one op."""
        old = found.reads[role]
        native = self._value(old.source) if value is None else checked_native(old, value, old.source)
        wanted = f"{old.source}_{found.id.rpartition('/')[2]}"
        source, tensor = self._new_param(wanted, old.source, native, old.dtype)
        read = self._reading(found, old, source, tensor)
        self._users[old.source].remove(found.id)
        self._users[source] = [found.id]
        self._params[source] = read
        self._ops[found.id] = replace(found, reads={**found.reads, role: read})

    def _reading(self, found: Found, old: Read, source: str, tensor: str) -> Read:
        """Let one op read its parameter from another tensor, through copies of the views of the old one."""
        node, index = old.edge
        chain = []
        while node not in found.nodes:
            users = sorted(self._graph.readers_of(node))
            chain.append(node)
            inside = [u for u in users if u in found.nodes]
            following = inside or [u for u in users if u in self._net.constant]
            if not following:
                raise ModelError(f"{found.id!r} reads {old.source!r} in a way that can't be split")
            node = following[0]
        last = tensor
        edge = (node, 0)
        for view in chain:
            copied = type(self._graph.nodes[view])()
            copied.CopyFrom(self._graph.nodes[view])
            copied.name = self._graph.free(f"{view}/{found.id.rpartition('/')[2]}")
            place = index if view == chain[0] else 0
            copied.input[place] = operand_of(last)
            self._graph.add(copied)
            edge = (copied.name, place) if view == chain[0] else edge
            last = f"{copied.name}:0"
        if chain:
            end = self._graph.nodes[node]
            place = next(i for i, t in enumerate(data_operands(end)) if node_of(t) == chain[-1])
            self._graph.rewire(node, place, last)
        else:
            self._graph.rewire(node, index, last)
            edge = (node, index)
        return Read(source, edge, tensor, old.form, old.dtype)

    @apply.register
    def _split_shared(self, edit: SplitSharedParam) -> None:
        found = self._op(edit.op)
        role = next((r for r, read in found.reads.items() if read.source == edit.param), None)
        if role is None:
            raise ModelError(f"{edit.op!r} has no parameter {edit.param!r}")
        if self._is_shared(edit.param):
            self._give_own(found, role, None)

    # -- structure

    @apply.register
    def _fold_batch_norm(self, edit: FoldBatchNorm) -> None:
        norm, into = self._op(edit.batch_norm), self._op(edit.into)
        if norm.kind is not OpKind.BATCH_NORM or into.kind not in LINEAR_KINDS or ParamRole.WEIGHT not in into.reads:
            raise ModelError(f"{edit.batch_norm!r} ({norm.type}) can't be folded into {edit.into!r} ({into.type})")
        if norm.inputs[0] == into.outputs[0]:
            self._only_reader(norm, norm.inputs[0], norm, into)
            self._fold_backward(norm, into)
        elif into.inputs[0] == norm.outputs[0]:
            self._only_reader(into, norm.outputs[0], norm, into)
            for name in into.nodes:
                for index, tensor in enumerate(data_operands(self._graph.nodes[name])):
                    if self._net.resolve(tensor) == norm.outputs[0]:
                        self._graph.rewire(name, index, norm.inputs[0])
            self._ops[into.id] = replace(into, inputs=norm.inputs)
            self._graph.collect([norm.end])
        else:
            raise ModelError(f"{edit.batch_norm!r} and {edit.into!r} are not neighbours")
        del self._ops[norm.id]

    def _only_reader(self, reader: Found, tensor: str, norm: Found, into: Found) -> None:
        others = [
            f.id for f in self._ops.values() if tensor in f.inputs and f.id != reader.id
        ]  # fmt: skip
        if others or self._net.is_end(tensor):
            where = repr(others[0]) if others else "the model's user"
            raise ModelError(f"{norm.id!r} can't be folded into {into.id!r}: {tensor!r} is also read by {where}")

    def _fold_backward(self, norm: Found, into: Found) -> None:
        name = norm.end
        last = self._graph.nodes[into.end]
        moved = self._graph.move_aside(name, "folded")
        if last.op in ADDS and ParamRole.BIAS in into.reads:
            # The sum that adds the bias moves to where the batch norm was.
            bias = into.reads[ParamRole.BIAS]
            copied = type(last)()
            copied.CopyFrom(last)
            copied.name = name
            self._graph.add(copied)
            inner = (*into.nodes[:-1], name)
            reads = dict(into.reads)
            if bias.edge[0] == last.name:
                reads[ParamRole.BIAS] = Read(bias.source, (name, bias.edge[1]), bias.tensor, bias.form, bias.dtype)
        else:
            alias = rewriter.unary("Identity", name, into.outputs[0], into.reads[ParamRole.WEIGHT].dtype)
            alias.attr[ALIAS].b = True
            self._graph.add(alias)
            inner, reads = (*into.nodes, name), dict(into.reads)
        channels = dict(into.channels)
        if into.outputs[0] in channels:
            channels[norm.outputs[0]] = channels[into.outputs[0]]
        self._ops[into.id] = replace(into, outputs=norm.outputs, nodes=inner, reads=reads, channels=channels)
        if ParamRole.BIAS in reads:
            self._params[reads[ParamRole.BIAS].source] = reads[ParamRole.BIAS]
        self._graph.collect([moved])
        self._graph.collect([last.name])

    @apply.register
    def _replace_activation(self, edit: ReplaceActivation) -> None:
        found = self._op(edit.op)
        if found.kind not in _ACTIVATION_KINDS or len(found.inputs) != 1:
            raise ModelError(f"{edit.op!r} ({found.type}) is no activation; it can't be turned into a {edit.type}")
        if edit.type not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ModelError(f"{edit.op!r} can't be turned into a {edit.type!r}; possible here: {known}")
        self._supplant(found, _ACTIVATIONS[edit.type])

    @apply.register
    def _remove_op(self, edit: RemoveOp) -> None:
        found = self._op(edit.op)
        if len(found.inputs) != 1 or len(found.outputs) != 1:
            raise ModelError(f"{edit.op!r} ({found.type}) doesn't pass one input on to one output; it can't be removed")
        if found.kind is not OpKind.IDENTITY:
            self._supplant(found, "Identity")
        for id, other in list(self._ops.items()):
            if found.outputs[0] in other.inputs:
                inputs = tuple(found.inputs[0] if t == found.outputs[0] else t for t in other.inputs)
                self._ops[id] = replace(other, inputs=inputs)
        del self._ops[edit.op]

    def _supplant(self, found: Found, op: str) -> None:
        """Put one node in the place of an op, under the name of its last one."""
        source = found.inputs[0]
        # An Identity at the model's end that gives the op its tensor's name stays.
        end = node_of(found.outputs[0])
        if self._graph.nodes[end].op == "Identity" and len(found.nodes) > 1 and found.id != end:
            end = found.nodes[-2]
        dtype = self._net.inference.dtype(source) if self._net.inference_has(source) else "float32"
        moved = self._graph.move_aside(end, "replaced")
        self._graph.add(rewriter.unary(op, end, source, dtype))
        self._graph.collect([moved])
        self._ops[found.id] = replace(found, nodes=(end,))


def _width(found: Found) -> int:
    shape = found.reads[ParamRole.WEIGHT].form.shape
    if found.kind is OpKind.CONV_TRANSPOSE:
        return shape[1] * (found.attrs.groups if isinstance(found.attrs, ConvAttrs) else 1)
    return shape[0]


def _bias_name(weight: str, op: OpId) -> str:
    for ending, other in (("kernel", "bias"), ("weights", "biases"), ("weight", "bias"), ("/w", "/b"), ("/W", "/b")):
        if weight.endswith(ending):
            return weight.removesuffix(ending) + other
    return f"{op}/bias"
