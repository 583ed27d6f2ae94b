"""In-place ops → functional ones, with views kept right, so that every node of a graph is a value of its own.

The exported graph replays the user's in-place ops (`relu_`, `add_`, `x[:, 0] = …`). A quantizer behind a value that
is overwritten later, or behind a view of it, would see the wrong numbers. After a mutation every later reader is given
the new value: of the tensor itself, of the tensor that it is a view of (through the view's inverse, as `slice_scatter`
is of `slice`), and of the other views of that, which are taken anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bitwright.errors import ModelError

aten = torch.ops.aten

IDENTITIES = frozenset({
    aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh.default, aten.view_as.default,
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.dropout.default,
    aten.feature_dropout.default, aten.alpha_dropout.default,
})  # fmt: skip
"""Ops whose result may be their operand itself."""
_RESHAPES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
})  # fmt: skip

Locate = Callable[[fx.Node], str]


def functionalize(graph: fx.Graph, locate: Locate) -> dict[fx.Node, fx.Node]:
    """Make a graph functional, in place.

    Args:
        graph: an exported graph whose nodes have `meta["val"]`.
        locate: where the user wrote a node, for messages.

    Returns:
        Placeholders that the model overwrites (state in buffers) → their value at the end.

    Raises:
        ModelError: a mutation through a view that has no functional form; the message holds the source line.
    """
    if not any(_is_mutation(node) for node in graph.nodes):
        return {}
    return _Functionalizer(graph, locate).run()


class _Functionalizer:
    def __init__(self, graph: fx.Graph, locate: Locate) -> None:
        self._graph = graph
        self._locate = locate
        self._current: dict[fx.Node, fx.Node] = {}
        self._base: dict[fx.Node, fx.Node] = {}
        self._views: dict[fx.Node, list[fx.Node]] = {}
        self._recipes: dict[fx.Node, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        self._lost: dict[fx.Node, ModelError] = {}
        """Nodes whose value can't be told after a mutation, with what is to be said if one is read."""

    def run(self) -> dict[fx.Node, fx.Node]:
        for node in list(self._graph.nodes):
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            mutation = _is_mutation(node)
            aliased = source is not None and (mutation or _same_memory(source, node))
            if aliased and source is not None:
                self._base[node] = source
                self._views.setdefault(source, []).append(node)
                self._recipes[node] = (node.target, node.args, dict(node.kwargs))
            node.args = fx.node.map_arg(node.args, self._latest)
            node.kwargs = fx.node.map_arg(node.kwargs, self._latest)
            if mutation and source is not None:
                with self._graph.inserting_before(node):
                    value = self._functional(node)
                self._recipes[node] = (aten.alias.default, (source,), {})
                self._assign(node, value, node)
        written = {n: v for n, v in self._current.items() if n.op == "placeholder"}
        for node in reversed(list(self._graph.nodes)):
            if _is_mutation(node) and not node.users:
                self._graph.erase_node(node)
        return written

    def _latest(self, node: fx.Node) -> fx.Node:
        if node in self._lost:
            raise self._lost[node]
        return self._current.get(node, node)

    def _functional(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        args: tuple[Any, ...] = node.args
        if target is aten.copy_.default:
            destination, value = args[0].meta["val"], args[1].meta["val"]
            new: fx.Node = args[1]
            if value.dtype != destination.dtype:
                new = self._call(node, aten.to.dtype, (new, destination.dtype), None)
            if tuple(value.shape) != tuple(destination.shape):
                new = self._call(node, aten.expand_as.default, (new, args[0]), destination)
            return new
        if target is aten.zero_.default:
            return self._call(node, aten.zeros_like.default, args, args[0].meta["val"])
        name, overload = str(target._schema.name).partition("::")[2], target._overloadname
        packet = getattr(aten, name.removesuffix("_"), None)
        if packet is None or overload not in packet.overloads():
            raise ModelError(
                f"the in-place op {name} has no functional form, at {self._locate(node)}; write the result into a "
                "new tensor there"
            )
        return self._call(node, getattr(packet, overload), args, node.meta.get("val"), dict(node.kwargs))

    def _call(self, like: fx.Node, target: Any, args: Any, value: Any, kwargs: Any = None) -> fx.Node:
        new = self._graph.call_function(target, args, kwargs or {})
        new.meta = {**like.meta, "val": like.meta.get("val") if value is None else value}
        return new

    def _assign(self, node: fx.Node, value: fx.Node, at: fx.Node) -> None:
        """From `at` on, `node` is `value`; so its base changes with it, and all views of that."""
        chain = [(node, value)]
        while (base := self._base.get(node)) is not None:
            try:
                with self._graph.inserting_before(at):
                    value = self._inverse(node, self._latest(base), value, at)
            except ModelError as error:
                self._lose(base, node, error)
                break
            node = base
            chain.append((node, value))
        for changed, new in chain:
            self._current[changed] = new
        kept = {changed for changed, _ in chain}
        for changed, _ in reversed(chain):
            self._refresh(changed, kept, at)

    def _lose(self, node: fx.Node | None, known: fx.Node, error: ModelError) -> None:
        """A base, all bases of it, and every view of them but the known one can't be told any more."""
        while node is not None:
            self._lost[node] = error
            for view in self._views.get(node, ()):
                if view is not known and view.target is not operator.getitem:
                    self._lose_views(view, error)
            known, node = node, self._base.get(node)

    def _lose_views(self, node: fx.Node, error: ModelError) -> None:
        self._lost[node] = error
        for view in self._views.get(node, ()):
            self._lose_views(view, error)

    def _refresh(self, base: fx.Node, kept: set[fx.Node], at: fx.Node) -> None:
        for view in self._views.get(base, ()):
            if view in kept:
                continue
            target, args, kwargs = self._recipes[view]
            with self._graph.inserting_before(at):
                args = fx.node.map_arg(args, self._latest)
                self._current[view] = self._call(view, target, args, None, kwargs)
            self._refresh(view, kept, at)

    def _inverse(self, view: fx.Node, base: fx.Node, value: fx.Node, at: fx.Node) -> fx.Node:
        """The base with `value` in the place that `view` shows."""
        target, args, _ = self._recipes[view]
        rest, whole = args[1:], base.meta["val"]
        if target in IDENTITIES:
            return value
        if target is aten.slice.Tensor:
            return self._call(at, aten.slice_scatter.default, (base, value, *rest), whole)
        if target is aten.select.int:
            return self._call(at, aten.select_scatter.default, (base, value, *rest), whole)
        if target is aten.diagonal.default:
            return self._call(at, aten.diagonal_scatter.default, (base, value, *rest), whole)
        if target is aten.narrow.default:
            dim, start, length = rest
            if isinstance(start, int) and isinstance(length, int):
                return self._call(at, aten.slice_scatter.default, (base, value, dim, start, start + length), whole)
        if target in (aten.transpose.int, aten.swapaxes.default):
            return self._call(at, aten.transpose.int, (value, *rest), whole)
        if target is aten.t.default:
            return self._call(at, aten.t.default, (value,), whole)
        if target is aten.permute.default:
            order = [int(i) % len(rest[0]) for i in rest[0]]
            back = [order.index(i) for i in range(len(order))]
            return self._call(at, aten.permute.default, (value, back), whole)
        if target in _RESHAPES:
            shape = [
                n if isinstance(n, int) else self._call(at, aten.sym_size.int, (base, i), n)
                for i, n in enumerate(whole.shape)
            ]
            return self._call(at, aten.reshape.default, (value, shape), whole)
        raise ModelError(
            f"a tensor is overwritten through its view ({target}), at {self._locate(at)}; write the result into a new "
            "tensor there (torch.where, torch.cat, or an op without the trailing underscore)"
        )


def _is_mutation(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    first = schema.arguments[0] if schema.arguments else None
    return schema.is_mutable and first is not None and first.alias_info is not None and first.alias_info.is_write


def _same_memory(a: fx.Node, b: fx.Node) -> bool:
    held = {t.untyped_storage()._cdata for t in _tensors(a)}
    return any(t.untyped_storage()._cdata in held for t in _tensors(b))


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, torch.Tensor)]
