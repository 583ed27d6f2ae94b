"""Parameters as ops see them: a tensor of the model, or a part or transposition of one, in canonical layout.

`nn.MultiheadAttention` multiplies with thirds of one matrix, GPT-2 with (in, out) matrices, a tied output layer with
the embedding's table. A view of a parameter is a parameter too ("in_proj_weight.chunk(3)[0]"); it is written through
the view. Transposing a matrix makes no new parameter: only the layout differs, so a tied matrix keeps one id.

What is computed from parameters and constants alone (a weight normalization, a gate `sigmoid(g)`, fusion weights, a
table of position biases) is one parameter too, called by the tensor that it is. It is computed anew in each run, so
that gradients reach what it is computed from; to set it is to put a parameter of its own in its place (see `edits`).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright_torch.graph.constants import Evaluator, computed, constant_nodes
from bitwright_torch.graph.matrix_reads import outputs_are_rows
from bitwright_torch.graph.model import info, tensor_of
from bitwright_torch.graph.naming import call_name

aten = torch.ops.aten
_PARAMETRIZED = re.compile(r"(?P<module>.*\.)?parametrizations\.(?P<name>\w+)(\..*)?\.output")
_TRANSPOSES = frozenset({aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default})
_LISTS = frozenset(
    {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.unbind.int}
)
_VIEWS = frozenset({
    *_LISTS, aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.view.default, aten.reshape.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints,
    aten.detach.default, aten.alias.default, *_TRANSPOSES,
})  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """A parameter as an operand.

    Attributes:
        id: "layer.weight", or with the view: "in_proj_weight.chunk(3)[0]".
        base: the tensor of the model.
        steps: the view, as (function, arguments after the tensor).
        transposed: the operand is the matrix's transpose.
        shape: as the op sees it.
        evaluator: computes it; None for a tensor of the model and its views.
    """

    id: str
    base: str
    steps: tuple[tuple[Any, tuple[Any, ...]], ...]
    transposed: bool
    shape: tuple[int, ...]
    dtype: str
    evaluator: Evaluator | None = field(default=None, compare=False)

    def view(self, model: nn.Module) -> Tensor:
        """The parameter, not transposed, in the memory of the model's tensor; one that is computed in its own."""
        if self.evaluator is not None:
            with torch.no_grad():
                return self.evaluator(model).detach()
        value: Any = tensor_of(model, self.base).detach()
        for function, arguments in self.steps:
            value = function(value, *arguments)
        assert isinstance(value, Tensor)
        return value


def operands(graph: fx.Graph, model: nn.Module) -> Mapping[fx.Node, Operand]:
    """Every node that is a float parameter, a view of one with constant arguments, or computed from such alone."""
    made = computed(graph, constant_nodes(graph))
    taken = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    found: dict[fx.Node, Operand] = {}
    lists: dict[fx.Node, Operand] = {}  # what chunk and split return
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).rpartition(".")[2] != "training":
            name = str(node.target)
            tensor = tensor_of(model, name)
            if tensor.is_floating_point():
                dtype = str(tensor.dtype).removeprefix("torch.")
                found[node] = Operand(info(node).tensor, name, (), False, tuple(tensor.shape), dtype)
            continue
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if (evaluator := made.get(node)) is not None:
            about = info(node)
            base = next(iter(evaluator.reads), "")
            shape = tuple(n or 0 for n in about.shape or ())
            found[node] = Operand(_name(node, taken), base, (), False, shape, about.dtype, evaluator)
        if source is None or len(node.all_input_nodes) != 1 or node.kwargs:
            continue
        if node.target is operator.getitem and source in lists:
            viewed = _stepped(lists[source], node, f"[{node.args[1]}]")
            _keep_view(found, node, viewed, model)
        elif source in found and node.target in _TRANSPOSES and len(found[source].shape) == 2:
            operand = found[source]
            swaps = _swaps(node)
            found[node] = replace(
                operand,
                shape=operand.shape[::-1] if swaps else operand.shape,
                transposed=operand.transposed != swaps,
            )
        elif (
            source in found
            and node.target in _VIEWS
            and not found[source].transposed
            and found[source].evaluator is None
        ):
            text = ", ".join(str(list(a) if isinstance(a, list | tuple) else a) for a in node.args[1:])
            plain = node.target in (aten.detach.default, aten.alias.default)
            viewed = _stepped(found[source], node, "" if plain else f".{call_name(node)}({text})")
            if node.target in _LISTS:
                lists[node] = viewed
            else:
                _keep_view(found, node, viewed, model)
    _turn_apart(graph, found)
    return found


def _turn_apart(graph: fx.Graph, found: dict[fx.Node, Operand]) -> None:
    """Where ops read a matrix both ways round, its transposes are parameters of their own: one id, one layout."""
    facing: dict[str, set[bool]] = {}
    for node, operand in found.items():
        for user in node.users:
            if len(operand.shape) == 2 and user not in found and user.op == "call_function":
                facing.setdefault(operand.id, set()).add(outputs_are_rows(user, node) != operand.transposed)
    for node, operand in list(found.items()):
        if operand.transposed and operand.evaluator is None and len(facing.get(operand.id, ())) == 2:
            tensor, shape = info(node).tensor, operand.shape
            found[node] = Operand(tensor, operand.base, (), False, shape, operand.dtype, Evaluator(graph, node))


def _name(node: fx.Node, taken: Collection[str]) -> str:
    """A computed parameter's id: the attribute that a parametrization stands for, else its tensor's own."""
    tensor = info(node).tensor
    match = _PARAMETRIZED.fullmatch(tensor)
    wanted = f"{match['module'] or ''}{match['name']}" if match else tensor
    return tensor if wanted in taken else wanted


def _swaps(node: fx.Node) -> bool:
    """Whether a transposing op on a matrix swaps its axes."""
    numbers: list[Any] = [a for a in node.args[1:] if not isinstance(a, fx.Node)]
    if node.target is aten.permute.default:
        return [int(i) % 2 for i in numbers[0]] == [1, 0]
    if node.target is aten.transpose.int:
        return (int(numbers[0]) - int(numbers[1])) % 2 != 0
    return True


def _stepped(source: Operand, node: fx.Node, suffix: str) -> Operand:
    return replace(source, id=source.id + suffix, steps=(*source.steps, (node.target, tuple(node.args[1:]))))


def _keep_view(found: dict[fx.Node, Operand], node: fx.Node, operand: Operand, model: nn.Module) -> None:
    """Keep it where it really lies in the parameter's memory (a reshape may have to copy)."""
    value = operand.view(model)
    if value.untyped_storage().data_ptr() == tensor_of(model, operand.base).untyped_storage().data_ptr():
        found[node] = replace(operand, shape=tuple(value.shape))
