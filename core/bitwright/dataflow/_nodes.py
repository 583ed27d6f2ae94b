"""A model as it is captured: calls of the framework with their operands, before it is told which are parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from numpy.typing import NDArray

from bitwright.dataflow._layouts import Layout
from bitwright.graph import Attrs, ParamRole

ValueId = str
Array = Any
"""An array of the framework."""


@dataclass(frozen=True, eq=False)
class Value:
    """An operand.

    Attributes:
        kind: "input", "parameter", "constant", "derived" (computed from parameters and constants alone) or "result".
        shape: None where a length is free.
        array: what it holds, unless it is an input or a result.
    """

    id: ValueId
    kind: Literal["input", "parameter", "constant", "derived", "result"]
    shape: tuple[int | None, ...]
    dtype: str
    array: NDArray[Any] | None = None

    @property
    def known(self) -> bool:
        """Whether it depends on no input."""
        return self.array is not None


@dataclass(frozen=True, eq=False)
class Step:
    """A call of the framework: from its operands, in order, its outputs."""

    function: Callable[..., Sequence[Array]]
    operands: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]


@dataclass(frozen=True, eq=False)
class Node:
    """An op to be.

    Attributes:
        type: of ONNX, or "Flip" and "SumPool" for what only the recognizers know.
        operands: in ONNX's order; None for one that is absent.
        steps: that compute it.
        attributes: by ONNX's names.
        attrs: canonical attributes.
        layouts: from an operand as it is to the canonical layout of a parameter, by position.
        channels: axis of the channels in the first operand and in the first output, where the op has a say in it.
        roles: of operands by position, where the type doesn't tell.
        name: of the op; "" for one to be made up.
        native: the framework's name of it.
        source: where the user wrote it.
    """

    type: str
    operands: tuple[ValueId | None, ...]
    outputs: tuple[ValueId, ...]
    steps: tuple[Step, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    attrs: Attrs | None = None
    layouts: Mapping[int, Layout] = field(default_factory=dict)
    channels: tuple[int, int] | None = None
    roles: Mapping[int, ParamRole] = field(default_factory=dict)
    name: str = ""
    native: str = ""
    source: str | None = None

    @property
    def output(self) -> ValueId:
        """The first output."""
        return self.outputs[0]

    @property
    def present(self) -> tuple[ValueId, ...]:
        """Operands that are there."""
        return tuple(o for o in self.operands if o is not None)


class Nodes:
    """Nodes in order, with what lies before and behind each value. Immutable; `replaced` makes another."""

    def __init__(
        self, values: Mapping[ValueId, Value], nodes: Sequence[Node], derived: Mapping[ValueId, Node],
        outputs: Sequence[ValueId],
    ) -> None:  # fmt: skip
        self.values, self.nodes, self.derived, self.outputs = values, tuple(nodes), derived, tuple(outputs)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    @cached_property
    def _producers(self) -> dict[ValueId, Node]:
        return {v: node for node in self.nodes for v in node.outputs}

    @cached_property
    def _users(self) -> dict[ValueId, list[Node]]:
        found: dict[ValueId, list[Node]] = {}
        for node in self.nodes:
            for v in dict.fromkeys(node.present):
                found.setdefault(v, []).append(node)
        return found

    def producer(self, value: ValueId | None) -> Node | None:
        """The node that computes a value, from inputs or from parameters alone."""
        return None if value is None else self._producers.get(value) or self.derived.get(value)

    def users(self, value: ValueId) -> Sequence[Node]:
        """The nodes that read a value."""
        return self._users.get(value, ())

    def sole_user(self, value: ValueId) -> Node | None:
        """The one node that reads a value that isn't an output of the model."""
        users = self.users(value)
        return users[0] if len(users) == 1 and value not in self.outputs else None

    def number(self, value: ValueId | None) -> float | None:
        """The one number that a constant holds, however often."""
        held = None if value is None else self.values[value]
        if held is None or held.array is None or self.root(held.id) is not None or not held.array.size:
            return None
        flat = held.array.reshape(-1)
        return float(flat[0]) if (flat == flat[0]).all() else None

    def root(self, value: ValueId | None) -> tuple[ValueId, Layout] | None:
        """The parameter that a value is, in another layout perhaps; None for anything else."""
        layout = Layout()
        while value is not None and self.values[value].kind == "derived":
            node = self.derived[value]
            step = _moved(self, node)
            if step is None:
                return None
            layout, value = step.then(layout), node.present[0]
        return (value, layout) if value is not None and self.values[value].kind == "parameter" else None

    def replaced(self, members: Sequence[Node], by: Node) -> Nodes | None:
        """The nodes with one in the place of several; None where something outside reads what only these compute.

        Args:
            members: those that go.
            by: computes the outputs of the last of them, by the same steps if it has none of its own.
        """
        gone = {id(node) for node in members}
        inner = [v for node in members for v in node.outputs if v not in by.outputs]
        for value in inner:
            if value in self.outputs or any(id(user) not in gone for user in self.users(value)):
                return None
        found = []
        last = max(i for i, node in enumerate(self.nodes) if id(node) in gone)
        for i, node in enumerate(self.nodes):
            if i == last:
                found.append(by)
            elif id(node) not in gone:
                found.append(node)
        return Nodes(self.values, found, self.derived, self.outputs)

    def without(self, node: Node, source: ValueId) -> Nodes:
        """The nodes without one that hands on `source` as it is."""

        def renamed(names: tuple[ValueId | None, ...]) -> tuple[Any, ...]:
            return tuple(source if name == node.output else name for name in names)

        kept = [
            replace(
                other,
                operands=renamed(other.operands),
                steps=tuple(replace(step, operands=renamed(step.operands)) for step in other.steps),
            )
            if node.output in other.present
            else other
            for other in self.nodes
            if other is not node
        ]
        return Nodes(self.values, kept, self.derived, self.outputs)

    def living(self) -> Nodes:
        """Without what no output depends on."""
        wanted, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs):
                kept.append(node)
                wanted.update(node.present)
        return Nodes(self.values, kept[::-1], self.derived, self.outputs)


def _moved(nodes: Nodes, node: Node) -> Layout | None:
    """What a node that only moves values of its first operand does to a layout."""
    if not node.operands or node.operands[0] is None:
        return None
    before, after = (nodes.values[v].array for v in (node.operands[0], node.output))
    if before is None or after is None:
        return None
    if node.type == "Identity":
        return Layout()
    if node.type == "Transpose":
        return Layout().permuted(*node.attributes["perm"])
    if node.type == "Flip":
        return Layout().flipped(*node.attributes["axes"])
    return Layout().reshaped(before.shape, after.shape) if node.type == "Reshape" else None


def is_float(value: Value) -> bool:
    """Whether it can be a parameter."""
    return value.dtype.startswith(("float", "bfloat"))
