"""The core's graph edits, carried out on a captured graph and its module tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from bitwright.backend import Branch, Editor
from bitwright.errors import ModelError
from bitwright.graph import ACTIVATION_TYPES, BranchNames, Edit, Formula, Op, OpId, Param, ParamId, TensorId
from bitwright_torch.graph import modes
from bitwright_torch.graph.canonical import canonical
from bitwright_torch.graph.model import NAMES, CapturedModel, NodeInfo, info, owner_of, program_of, share, tensor_of
from bitwright_torch.graph.operands import Operand, operands
from bitwright_torch.graph.params import native_values, write_params

aten = torch.ops.aten
_CALLS: dict[str, Any] = {
    "Relu": aten.relu.default, "Relu6": aten.relu6.default, "Sigmoid": aten.sigmoid.default,
    "Tanh": aten.tanh.default, "Identity": aten.alias.default, "Softplus": aten.softplus.default,
    "Elu": aten.elu.default, "Selu": aten.selu.default, "LeakyRelu": aten.leaky_relu.default,
    "HardSigmoid": aten.hardsigmoid.default, "HardSwish": aten.hardswish.default, "Mish": aten.mish.default,
    "Gelu": aten.gelu.default, "Swish": aten.silu.default, "Abs": aten.abs.default, "Add": aten.add.Tensor,
    "Div": aten.div.Tensor,
}  # fmt: skip
SPELLED = "bitwright_spelled"
"""Key of `fx.Node.meta`: an edit has put the node in as a part of an activation."""


def edit_model(model: CapturedModel, edits: Sequence[Edit]) -> CapturedModel:
    """A new model with the edits applied in order; unchanged tensors share memory with `model`'s.

    Raises:
        ModelError: an edit names what isn't there, or would change what the model computes elsewhere.
    """
    editor = TorchEditor(model)
    editor.apply_all(edits)
    return editor.finish()


def obstacle_to_branch(model: CapturedModel, op: OpId) -> str:
    """See `bitwright.backend.Branching`."""
    return TorchEditor(model, copied=False).branch_obstacle(op)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the nodes' information."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    copied.output_node().meta = dict(graph.output_node().meta)
    return copied


class TorchEditor(Editor):
    """Edits a copy of the graph; tensors are copied when they change.

    Args:
        model: stays as it is.
        copied: whether there is a copy of the graph; one that is only asked needs none.
    """

    activations = frozenset(ACTIVATION_TYPES) & _CALLS.keys()

    def __init__(self, model: CapturedModel, *, copied: bool = True) -> None:
        shown = canonical(model)
        super().__init__(shown.graph)
        self._program = program_of(model)
        self._model = model
        self._graph = copy_graph(self._program.graph) if copied else self._program.graph
        self._known: dict[str, tuple[Operand, Param]] = dict(shown.params)
        self._nodes: dict[OpId, fx.Node] = {}
        for node in self._graph.nodes:
            if node.op == "call_function" and info(node).op in self.ops:
                self._nodes.setdefault(info(node).op, node)
        self._owned: set[str] = set()
        self._restructured = False

    @cached_property
    def _tree(self) -> nn.Module:
        return share(self._model)

    def finish(self) -> CapturedModel:
        """The edited model."""
        if not self._restructured:
            return CapturedModel(self._tree, self._program)
        for node in reversed(list(self._graph.nodes)):
            if node.op == "get_attr" and not node.users:
                self._graph.erase_node(node)
        self._graph.lint()
        return CapturedModel(self._tree, self._program.with_graph(self._graph))

    def _node(self, op: Op) -> fx.Node:
        if op.id not in self._nodes:
            raise ModelError(f"{op.id!r} ({op.type}) is a part of fused attention; it can't be edited")
        return self._nodes[op.id]

    def _source(self, op: Op) -> fx.Node:
        """The node that computes the one tensor that an op reads."""
        read = [n for n in self._node(op).all_input_nodes if n.op != "get_attr" and SPELLED not in n.meta]
        if len(read) != 1:
            raise ModelError(f"{op.id!r} ({op.type}) reads {op.data_inputs[0]!r} in a way that can't be edited")
        return read[0]

    # -- values

    def set_values(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """See `Editor`."""
        native_values(self._known, values)  # all are checked before the first is changed
        for id in values:
            self._make_parameter(id)
        write_params(self._tree, self._known, values, self._owned)

    def add_bias(self, op: Op, value: NDArray[np.floating]) -> ParamId:
        """See `Editor`."""
        node, (operand, _) = self._node(op), self._known[str(op.weight)]
        if node.target in (aten.matmul.default, aten.mm.default):
            self._make_parameter(operand.id)  # a transpose of what is computed would be another parameter
            operand, _ = self._known[operand.id]
        weight = tensor_of(self._tree, operand.base)
        bias = torch.from_numpy(np.ascontiguousarray(value)).to(weight.device, weight.dtype)
        name = self._register(_bias_name(operand, op.id), bias, weight.requires_grad)
        self._attach_bias(node, self._read(node, name))
        self._restructured = True
        dtype, shape, id = str(bias.dtype).removeprefix("torch."), tuple(bias.shape), self._program.prefix + name
        self._known[id] = (
            Operand(id, name, (), False, shape, dtype),
            Param(id, shape, dtype, tuple(range(len(shape)))),
        )
        return id

    def own_obstacle(self, op: Op) -> str:
        """See `Editor`."""
        if op.id not in self._nodes:
            return "it is a part of fused attention"
        reads = isinstance(self._data_argument(self._nodes[op.id]), fx.Node)
        return "" if reads else f"it reads {op.data_inputs[0]!r} in a way that can't be edited"

    def add_branch(self, op: Op, names: BranchNames, down: NDArray[np.float32], up: NDArray[np.float32]) -> Branch:
        """See `Editor`; the matrices lie beside the layer's own parameters."""
        node, (operand, _) = self._node(op), self._known[str(op.weight)]
        source = self._data_argument(node)
        assert isinstance(source, fx.Node)
        about, product = info(node), self.free_tensor(f"{op.id}/product")
        inner, outer = self.free_tensor(names.down), self.free_tensor(names.up)
        read: list[fx.Node] = []
        params: list[ParamId] = []
        for last, value in (("down", down), ("up", up)):
            wanted = f"{operand.base.rpartition('.')[0]}.branch_{last}".removeprefix(".")
            name = self._add_matrix(operand, wanted, value)
            read.append(self._read(node, name))
            params.append(self._program.prefix + name)
        shape, sizes = about.shape or (), about.sizes
        width = str(len(down))
        with self._graph.inserting_after(node):
            first = self._graph.call_function(aten.linear.default, (source, read[0]))
        first.meta[NAMES] = replace(
            about, op=names.down, tensor=inner, shape=(*shape[:-1], len(down)), sizes=(*sizes[:-1], width)
        )
        with self._graph.inserting_after(first):
            second = self._graph.call_function(aten.linear.default, (first, read[1]))
        second.meta[NAMES] = replace(about, op=names.up, tensor=outer)
        with self._graph.inserting_after(second):
            total = self._graph.call_function(aten.add.Tensor, (node, second))
        total.meta[NAMES] = replace(about, op=names.total)
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        node.meta[NAMES] = replace(about, tensor=product)
        self._nodes.update({names.down: first, names.up: second, names.total: total})
        self._restructured = True
        return Branch(product, (inner, outer), (params[0], params[1]))

    def _add_matrix(self, beside: Operand, wanted: str, value: NDArray[np.float32]) -> str:
        """A new parameter of the type and in the place of another's; returns its name."""
        like = beside.view(self._tree)
        matrix = torch.from_numpy(np.ascontiguousarray(value)).to(like.device, like.dtype)
        name = self._register(wanted, matrix, bool(beside.base) and tensor_of(self._tree, beside.base).requires_grad)
        dtype, shape, id = str(matrix.dtype).removeprefix("torch."), tuple(matrix.shape), self._program.prefix + name
        self._known[id] = (Operand(id, name, (), False, shape, dtype), Param(id, shape, dtype, (0, 1)))
        return name

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
        dead, erased = [node], set[fx.Node]()
        while dead:
            gone = dead.pop()
            if gone.users or gone in erased:
                continue
            erased.add(gone)
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

    def only_reader(self, tensor: TensorId, reader: Op) -> bool:
        """See `Editor`; what works on shapes reads too."""
        node = self._node(reader)
        source = self._data_argument(node)
        return isinstance(source, fx.Node) and set(source.users) == {node}

    def fold_backward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        node, other = self._batch_norm(norm), self._node(into)
        node.replace_all_uses_with(other)
        other.meta[NAMES] = replace(info(other), tensor=info(node).tensor)
        self._erase(norm)

    def fold_forward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        node, other = self._batch_norm(norm), self._node(into)
        assert isinstance(node.args[0], fx.Node)
        assert self._data_argument(other) is node
        other.replace_input_with(node, node.args[0])
        self._erase(norm)

    def _batch_norm(self, norm: Op) -> fx.Node:
        node = self._node(norm)
        if node.target is not modes.batch_norm:
            raise ModelError(f"{norm.id!r} ({norm.type}) is computed in a way that can't be folded")
        return node

    def _data_argument(self, node: fx.Node) -> Any:
        return node.args[1] if node.target is aten.addmm.default else node.args[0]

    def _erase(self, op: Op) -> None:
        """Remove an op that nothing reads any more, and parameters that only it read."""
        node = self._nodes.pop(op.id)
        inputs = node.all_input_nodes
        self._graph.erase_node(node)
        self._restructured = True
        self._forget_unread(inputs)

    def _forget_unread(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            if node.users:
                continue
            if node.op == "get_attr":
                self._forget(node)
            elif node.meta.get(SPELLED):
                inputs = node.all_input_nodes
                self._graph.erase_node(node)
                self._forget_unread(inputs)

    def put_activation(self, op: Op, formula: Formula) -> None:
        """See `Editor`."""
        node = self._node(op)
        inputs = node.all_input_nodes
        source = self._source(op)
        operands = [self._computed(o, source, f"{op.id}/{formula.type}", node) for o in formula.operands]
        node.target, node.args, node.kwargs = _CALLS[formula.type], tuple(operands), {}
        self._restructured = True
        self._forget_unread(inputs)

    def _computed(self, what: Formula | float | None, source: fx.Node, name: str, before: fx.Node) -> fx.Node | float:
        """Put nodes that compute a formula of a tensor in front of a node."""
        if not isinstance(what, Formula):
            return source if what is None else what
        inner = f"{name}/{what.type}"
        operands = [self._computed(o, source, inner, before) for o in what.operands]
        with self._graph.inserting_before(before):
            made = self._graph.call_function(_CALLS[what.type], tuple(operands))
        made.meta[NAMES] = replace(info(source), op=inner, tensor=inner)
        made.meta[SPELLED] = True
        return made

    def drop(self, op: Op, *, renames: bool) -> None:
        """See `Editor`."""
        node = self._node(op)
        if info(node).shape is None:
            raise ModelError(f"{op.id!r} ({op.type}) doesn't pass one input on to one output; it can't be removed")
        source = self._source(op)
        node.replace_all_uses_with(source)
        if renames:
            source.meta[NAMES] = replace(info(source), tensor=info(node).tensor)
        self._erase(op)

    def split(self, op: Op, param: ParamId) -> ParamId:
        """See `Editor`."""
        node, (operand, shown) = self._node(op), self._known[param]
        readers = [
            n for n, o in operands(self._graph, self._tree).items() if o.id == param and n in node.all_input_nodes
        ]
        value = operand.view(self._tree).clone()
        trainable = tensor_of(self._tree, operand.base).requires_grad
        name = self._untie(op.id, operand, value, trainable)
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
        self._restructured = True
        return id

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
