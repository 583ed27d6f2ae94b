"""Decomposing an exported program for torch.onnx op by op.

`ExportedProgram.run_decompositions` traces the whole program anew, twice, which takes most of an export's time; of most
programs it changes few ops, and the same ones in every block. Here only those are traced, equal ones once.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten
Table = Mapping[Any, Callable[..., Any]]


def piecewise(module: nn.Module, inputs: tuple[torch.Tensor, ...], dynamic_shapes: Any) -> Piecewise | None:
    """A module as such a program, captured as torch.onnx itself does it first; None where that doesn't do."""
    try:
        from torch.fx.experimental import _config

        # As sizes are told apart there: 0 and 1 aren't taken for good.
        with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception:
        return None  # torch.onnx has other ways, and tells the reason
    if any("lstm" in str(n.target) or "gru" in str(n.target) for n in program.graph.nodes):
        return None  # it captures these as loops where sizes are free
    return Piecewise.of(program)


class Piecewise(ExportedProgram):
    """A program that is decomposed op by op, where all it holds are ops of ATen that write to nothing."""

    @classmethod
    def of(cls, program: ExportedProgram) -> Piecewise:
        """The program, which isn't changed."""
        made = copy.copy(program)
        made.__class__ = cls
        assert isinstance(made, Piecewise)
        return made

    def run_decompositions(self, decomp_table: Any = None, **options: Any) -> ExportedProgram:
        """See `ExportedProgram`, which does it where this can't."""
        if decomp_table is not None and not options:
            try:
                return self._decomposed(dict(decomp_table))
            except Exception:  # whatever it is: what is left undone here, the whole trace does or tells the reason of
                pass
        whole: ExportedProgram = super().run_decompositions(decomp_table, **options)
        return whole

    def _decomposed(self, table: Table) -> ExportedProgram:
        graph = copy.deepcopy(self.graph)
        signature = copy.deepcopy(self.graph_signature)
        pieces: dict[Any, fx.Graph] = {}
        with torch.no_grad():
            for node in list(graph.nodes):
                if not _changes(node, table):
                    continue
                key, sources, call = _call(node)
                if key not in pieces:
                    pieces[key] = _traced(call, sources, table)
                for old, new in _put_in(graph, node, pieces[key], sources).items():
                    signature.replace_all_uses(old, new)
        graph.eliminate_dead_code()
        graph.lint()
        made = copy.copy(self)
        made._graph_module = fx.GraphModule(self.graph_module, graph)
        made._graph_signature = signature
        return made


class _Unknown(Exception):
    """A node that only a trace of the whole program decomposes."""


def _changes(node: fx.Node, table: Table) -> bool:
    """Whether decomposing changes a node: it is in the table, or composite and may hand out its operand."""
    target = node.target
    if node.op == "get_attr":
        raise _Unknown(node.format_node())  # the body of a loop or condition
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        if isinstance(target, torch._ops.OperatorBase):
            raise _Unknown(str(target))
        return False  # an input, or arithmetic with sizes
    if target.namespace != "aten" or target._schema.is_mutable or "lift" in target._opname:
        raise _Unknown(str(target))
    if all(isinstance(v, int | float | bool | torch.SymInt) for v in pytree.tree_leaves(node.meta.get("val"))):
        return False  # a size, or a check of one
    from torch._export.utils import _check_valid_to_preserve  # here, so that where it is gone the whole is traced

    return target in table or (target._can_decompose() and not _check_valid_to_preserve(target))


def _call(node: fx.Node) -> tuple[Any, list[fx.Node], Callable[..., Any]]:
    """What calls are equal by, the nodes that a call reads, and the call as a function of their values."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    sources = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
    places = {source: i for i, source in enumerate(sources)}
    target: Any = node.target

    def call(*values: Any) -> Any:
        given = [values[places[leaf]] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(given, spec)
        return target(*args, **kwargs)

    about = [f"node {places[v]}" if isinstance(v, fx.Node) else f"{type(v).__name__} {v!r}" for v in leaves]
    return (target, str(spec), *about, *(_described(s.meta["val"]) for s in sources)), sources, call


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device} {value.requires_grad}"
    return f"{type(value).__name__} {value}"


def _traced(call: Callable[..., Any], sources: list[fx.Node], table: Table) -> fx.Graph:
    values = [source.meta["val"] for source in sources]
    mode = detect_fake_mode(values)
    if mode is None:
        raise _Unknown("no tensor is read")
    with mode, enable_python_dispatcher():
        return make_fx(call, decomposition_table=dict(table))(*values).graph


def _put_in(graph: fx.Graph, node: fx.Node, piece: fx.Graph, sources: list[fx.Node]) -> dict[str, str]:
    """Put a piece in a node's place; names of the results before → now."""
    known: dict[fx.Node, fx.Node] = dict(zip((n for n in piece.nodes if n.op == "placeholder"), sources, strict=True))
    with graph.inserting_before(node):
        for inner in piece.nodes:
            if inner.target is aten.sym_numel.default:  # torch.onnx has no form of it
                known[inner] = _product(graph, known[inner.args[0]])
            elif inner.op == "call_function":
                known[inner] = graph.node_copy(inner, known.__getitem__)
                known[inner].meta = {**node.meta, "val": inner.meta["val"]}
            elif inner.op == "get_attr":
                raise _Unknown("a constant of its own")
    result: Any = piece.output_node().args[0]
    # Several results are read one by one.
    now = {node: result} if isinstance(result, fx.Node) else {user: result[user.args[1]] for user in node.users}
    for old, new in now.items():
        old.replace_all_uses_with(known[new])
        graph.erase_node(old)
    if node not in now:
        graph.erase_node(node)
    return {old.name: known[new].name for old, new in now.items()}


def _product(graph: fx.Graph, tensor: fx.Node) -> fx.Node:
    """How many values a tensor has, from its sizes."""
    count: Any = 1
    for axis, size in enumerate(tensor.meta["val"].shape):
        length = graph.call_function(aten.sym_size.int, (tensor, axis))
        length.meta = {**tensor.meta, "val": size}
        before = count if isinstance(count, int) else count.meta["val"]
        count = graph.call_function(operator.mul, (count, length))
        count.meta = {**tensor.meta, "val": before * size}
    assert isinstance(count, fx.Node)
    return count
