"""Conditions that inference always decides the same way: the branch that it takes, in the condition's place.

Graphs of TF 1 often hold a network twice, behind `tf.cond(is_training, …)`: batch norms and dropouts in training and
in inference. Once the predicate is a constant, one branch is left, and its ops are ops of the network as any others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tensorflow as tf

from bitwright.graph import TensorId
from bitwright_tensorflow.graph.frames import in_order, is_back
from bitwright_tensorflow.graph.graphs import Wiring, data_operands
from bitwright_tensorflow.graph.model import GraphDef, NodeDef, node_of, operand_of, tensor_id

_PASSING = frozenset({"Identity", "StopGradient", "PreventGradient", "Snapshot"})
_SWITCHES = frozenset({"Switch", "RefSwitch"})
_MERGES = frozenset({"Merge", "RefMerge"})
CONDITIONS = frozenset({"If", "StatelessIf"})
_DEFAULT = "PlaceholderWithDefault"
_LOGICAL = frozenset({"LogicalNot", "LogicalAnd", "LogicalOr"})


@dataclass(frozen=True)
class Taken:
    """What became of conditions.

    Attributes:
        changed: whether there was one that is always decided the same way.
        undecided: placeholders with a default that decide conditions which were left as they are.
        by_default: placeholders whose defaults decided conditions, with these.
    """

    changed: bool
    undecided: tuple[str, ...]
    by_default: Mapping[str, bool]


@dataclass
class _Value:
    """What a predicate always is, None if not always the same; and the placeholders with a default that it hangs on:
    those without which it wouldn't be known, or whose value isn't."""

    value: bool | None
    by_default: dict[str, bool] = field(default_factory=dict)
    undecided: tuple[str, ...] = ()


def take_branches(
    graph_def: GraphDef, inputs: Collection[TensorId], outputs: Sequence[TensorId], *, defaults: bool
) -> Taken:
    """Put the branch that is always taken in the place of each condition between inputs and outputs.

    Of TF 1's conditions (Switch … Merge) the tensors keep their names, and the dead branch stays in the graph for
    whatever else reads it. Of those of TF 2 (`If`) a call of the branch is left, for `inline_calls`; those within
    functions too.

    Args:
        graph_def: the caller's own.
        inputs, outputs: of the network.
        defaults: whether a placeholder that isn't an input has its default value, which the caller is to say. Where
            the graph goes back to the user to be trained it hasn't: there somebody feeds it.
    """
    graph = _Branches(graph_def, inputs, outputs, defaults)
    order = graph.wiring.order(outputs, set(inputs))
    changed = graph.call(order)
    by_default = graph.by_default
    for function in graph_def.library.function:
        if any(node.op in CONDITIONS for node in function.node_def):
            body = GraphDef()
            body.node.extend(function.node_def)
            inside = _Branches(body, (), (), defaults)
            if inside.call([node.name for node in body.node]):
                changed = True
                by_default |= inside.by_default
                del function.node_def[:]
                function.node_def.extend(body.node)
    while graph.join(order):
        changed = True  # and what a condition gave may decide others
        by_default |= graph.by_default
        graph = _Branches(graph_def, inputs, outputs, defaults)
        order = graph.wiring.order(outputs, set(inputs))
        graph.call(order)
    return Taken(changed, tuple(graph.undecided), by_default)


class _Branches:
    def __init__(
        self, graph_def: GraphDef, inputs: Collection[TensorId], outputs: Collection[TensorId], defaults: bool
    ) -> None:
        self.wiring = Wiring(graph_def)
        self.undecided: dict[str, None] = {}
        self.by_default: dict[str, bool] = {}
        self._inputs, self._outputs, self._defaults = set(inputs), set(outputs), defaults
        self._dead: dict[str, bool] = {}
        self._decided: dict[str, bool | None] = {}

    def predicate(self, tensor: TensorId) -> bool | None:
        """What a condition's predicate always is, if it is always the same."""
        found = self._value(tensor)
        if found.value is None:
            self.undecided.update(dict.fromkeys(found.undecided))
        else:
            self.by_default |= found.by_default
        return found.value

    def _value(self, tensor: TensorId) -> _Value:
        """Each tensor that it hangs on is looked at once: chains of conditions may be long, and share their parts."""
        start = self._origin(tensor)
        found: dict[TensorId, _Value] = {}
        waiting = {start: None}
        while waiting:
            current = next(reversed(waiting))
            operands = self._deciding(current)
            if missing := [t for t in operands if t not in found and t not in waiting]:
                waiting[missing[0]] = None
                continue
            del waiting[current]
            found[current] = self._from(current, [found.get(t, _Value(None)) for t in operands])
        return found[start]

    def _origin(self, tensor: TensorId) -> TensorId:
        """What is passed on as this tensor."""
        passed: set[TensorId] = set()
        while tensor not in self._inputs and tensor not in passed:
            node = self.wiring.nodes.get(node_of(tensor))
            if node is None or node.op not in {*_PASSING, *_SWITCHES}:
                break
            passed.add(tensor)
            tensor = data_operands(node)[0]
        return tensor

    def _deciding(self, tensor: TensorId) -> list[TensorId]:
        """What a tensor's value follows from."""
        node = self.wiring.nodes.get(node_of(tensor))
        if node is None or tensor in self._inputs or (node.op == _DEFAULT and not self._defaults):
            return []
        return [self._origin(t) for t in data_operands(node)] if node.op in (*_LOGICAL, _DEFAULT) else []

    def _from(self, tensor: TensorId, operands: Sequence[_Value]) -> _Value:
        """A tensor's value, of those that it follows from."""
        node = self.wiring.nodes.get(node_of(tensor))
        if node is None or tensor in self._inputs:
            return _Value(None)
        if node.op == "Const":
            value = tf.make_ndarray(node.attr["value"].tensor)
            return _Value(bool(value) if np.ndim(value) == 0 and value.dtype.kind in "biuf" else None)
        if node.op == _DEFAULT:
            found = operands[0] if operands else _Value(None)
            by_default = {} if found.value is None else {**found.by_default, node.name: found.value}
            return replace(found, by_default=by_default, undecided=(node.name,))
        if node.op == "LogicalNot":
            (found,) = operands
            return found if found.value is None else replace(found, value=not found.value)
        if node.op in _LOGICAL:
            return _either(operands, node.op == "LogicalOr")
        return _Value(None)

    def call(self, order: Sequence[str]) -> bool:
        """Conditions of TF 2 in `order` as calls of their branches; whether there was one."""
        changed = False
        for name in order:
            node = self.wiring.nodes[name]
            if node.op in CONDITIONS and (taken := self.predicate(tensor_id(node.input[0]))) is not None:
                _call(node, taken)
                changed = True
        return changed

    def join(self, order: Sequence[str]) -> bool:
        """Conditions of TF 1 in `order`: past their switches, and from their merges straight to what arrives.

        Returns:
            Whether a merge is gone.
        """
        decided = joined = False
        reached = in_order(self.wiring, order)  # assignments that a branch waits for are in the branch too
        for name in reached:
            node = self.wiring.nodes[name]
            decided |= self._taken(name) is not None
            arrives = [not self._is_dead(i) for i in node.input if not is_back(self.wiring, i)]
            self._dead[name] = not any(arrives) if node.op in _MERGES and arrives else not all(arrives)
        if not decided:
            return False
        for name in reached:
            node = self.wiring.nodes[name]
            if self._dead[name]:
                continue
            if node.op in _MERGES and any(self._is_dead(i) for i in node.input):
                alive = [i for i in node.input if not i.startswith("^") and not self._is_dead(i)]
                if len(alive) > 1 or self._index_read(name):  # it waits for whichever comes: its switches stay
                    continue
                self._pass_on(node, alive[0])
                joined = True
            if self._taken(name) is None:
                self._past_switches(node)
        return joined

    def _index_read(self, merge: str) -> bool:
        """Whether somebody asks a merge which of its operands came."""
        return bool(self.wiring.readers.get(f"{merge}:1")) or f"{merge}:1" in self._outputs

    def _taken(self, name: str) -> bool | None:
        """Which of its outputs a switch always gives; as it was found first, for what decides it may change since."""
        if name not in self._decided:
            node = self.wiring.nodes[name]
            self._decided[name] = self.predicate(tensor_id(node.input[1])) if node.op in _SWITCHES else None
        return self._decided[name]

    def _is_dead(self, operand: str) -> bool:
        """Whether what an operand reads is never computed."""
        name = node_of(operand)
        if self._dead.get(name, False):
            return True
        if operand.startswith("^") or name not in self.wiring.nodes:
            return False
        taken = self._taken(name)
        return taken is not None and tensor_id(operand) != f"{name}:{int(taken)}"

    def _past_switches(self, node: NodeDef) -> None:
        """Read what decided switches are given, and wait for none of them."""
        kept: list[str] = []
        for operand in node.input:
            if operand.startswith("^"):
                if not self._is_pivot(operand[1:]):
                    kept.append(operand)
                continue
            tensor = tensor_id(operand)
            while self._taken(node_of(tensor)) is not None:
                tensor = data_operands(self.wiring.nodes[node_of(tensor)])[0]
            kept.append(operand_of(tensor))
        del node.input[:]
        node.input.extend(kept)

    def _is_pivot(self, name: str) -> bool:
        """Whether a node only marks a branch that is taken."""
        while (node := self.wiring.nodes.get(name)) is not None and node.op in (*_PASSING, *_SWITCHES):
            if self._taken(name) is not None:
                return True
            name = node_of(node.input[0])
        return False

    def _pass_on(self, node: NodeDef, operand: str) -> None:
        dtype = node.attr["T"].type
        node.op = "Identity"
        node.attr.clear()
        node.attr["T"].type = dtype
        del node.input[:]
        node.input.append(operand)


def _either(values: Sequence[_Value], decisive: bool) -> _Value:
    """What several come to, of which one that is `decisive` decides alone."""
    deciding = [v for v in values if v.value is decisive]
    if deciding:
        return min(deciding, key=lambda v: len(v.by_default))
    known = all(v.value is not None for v in values)
    by_default = {name: value for v in values for name, value in v.by_default.items()}
    undecided = dict.fromkeys(name for v in values if v.value is None for name in v.undecided)
    return _Value(not decisive if known else None, by_default, tuple(undecided))


def _call(node: NodeDef, taken: bool) -> None:
    """An `If` as a call of one of its branches."""
    branch = node.attr["then_branch" if taken else "else_branch"].func
    kept = {key: node.attr[key] for key in ("Tin", "Tout", "_output_shapes") if key in node.attr}
    copies = {key: type(value)() for key, value in kept.items()}
    for key, value in kept.items():
        copies[key].CopyFrom(value)
    function = type(branch)()
    function.CopyFrom(branch)
    operands = list(node.input[1:])
    node.op = "PartitionedCall"
    node.attr.clear()
    for key, value in copies.items():
        node.attr[key].CopyFrom(value)
    node.attr["f"].func.CopyFrom(function)
    del node.input[:]
    node.input.extend(operands)
