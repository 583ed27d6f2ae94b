"""What is one op for quantization though a model computes it by several: means, norms, pools, softmax, activations.

It works on canonical types with constant operands, so a framework that traces models gets all of it by naming what
its functions are in ONNX's words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bitwright.dataflow._formulas import SPELLED, Found, Spelled, matches
from bitwright.dataflow._layouts import Layout
from bitwright.dataflow._nodes import Node, Nodes, Step, ValueId
from bitwright.graph import AxisAttrs, BatchNormAttrs, ParamRole, PoolAttrs, clipping

R = ParamRole
Finder = Callable[[Nodes, Node], tuple[Sequence[Node], Node] | None]
"""What a node is the end of: the nodes that go, and the one in their place (its steps are theirs)."""


def recognized(nodes: Nodes) -> Nodes:
    """With one node for each thing that is one op."""
    nodes = _biases_before_splits(_without_neutral(nodes))
    finders: list[Finder] = [_lookup, _mean, _average_pool, _softmax, _batch_norm]
    finders += [partial(_activation, spelled) for spelled in SPELLED]
    for find in finders:
        nodes = _everywhere(nodes, find)
    return nodes


def _everywhere(nodes: Nodes, find: Finder) -> Nodes:
    done: set[int] = set()
    while True:
        for node in nodes:
            if id(node) in done:
                continue
            done.add(id(node))
            found = find(nodes, node)
            changed = None if found is None else merged(nodes, *found)
            if changed is not None:
                nodes = changed
                break
        else:
            return nodes


_NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}


def _without_neutral(nodes: Nodes) -> Nodes:
    """Without x + 0, x − 0, x · 1 and x / 1, which libraries write where there is nothing to add."""
    for node in nodes:
        if node.type not in _NEUTRAL or len(node.present) != 2 or node.output in nodes.outputs:
            continue
        pairs = (node.present, node.present[::-1]) if node.type in ("Add", "Mul") else (node.present,)
        for x, other in pairs:
            same = (nodes.values[x].shape, nodes.values[x].dtype) == (
                nodes.values[node.output].shape, nodes.values[node.output].dtype,
            )  # fmt: skip
            if same and not nodes.values[x].known and nodes.number(other) == _NEUTRAL[node.type]:
                nodes = nodes.without(node, x)
                break
    return nodes


def merged(nodes: Nodes, members: Sequence[Node], by: Node) -> Nodes | None:
    """The nodes with members computed as one; None where they can't be."""
    chosen = {id(m) for m in members}
    ordered = [n for n in nodes if id(n) in chosen]
    steps = tuple(step for member in ordered for step in member.steps)
    source = next((m.source for m in ordered if m.source), None)
    return nodes.replaced(ordered, replace(by, steps=steps, source=source, name=by.name or _name(ordered)))


def _name(members: Sequence[Node]) -> str:
    return next((m.name for m in members if m.name), "")


def _biases_before_splits(nodes: Nodes) -> Nodes:
    """With a constant that is added after the last axis was split, as heads of attention are, added before."""
    for node in nodes:
        split = nodes.sole_user(node.output) if node.type == "MatMul" and node.present[1:] else None
        add = nodes.sole_user(split.output) if split is not None and split.type == "Reshape" else None
        if split is None or add is None or add.type != "Add" or len(add.present) != 2:
            continue
        bias = next((v for v in add.present if v != split.output), None)
        held = None if bias is None else nodes.values[bias]
        whole, parts = nodes.values[node.output], nodes.values[split.output].shape
        rank = len(whole.shape) - 1
        if bias is None or held is None or held.array is None or None in whole.shape[-1:]:
            continue
        width, kept = whole.shape[-1], held.array.shape
        if parts[:rank] != whole.shape[:rank] or held.array.size != width or _tail(kept) != parts[rank:]:
            continue
        flat, moved = f"{bias} as a row", f"{node.output} and {bias}"
        values = {**nodes.values, flat: replace(held, id=flat, kind="derived", shape=(width,)),
                  moved: replace(whole, id=moved)}  # fmt: skip
        values[flat] = replace(values[flat], array=held.array.reshape(width))
        row = Step(lambda b, n=width: [b.reshape((n,))], (bias,), (flat,))
        total = Step(lambda y, b: [y + b], (node.output, flat), (moved,))
        cut = replace(split.steps[0], operands=(moved,), outputs=add.outputs)
        derived = {**nodes.derived, flat: Node("Reshape", (bias,), (flat,), (row,), native="reshape")}
        swapped = {
            id(split): replace(add, operands=(node.output, flat), outputs=(moved,), steps=(total,)),
            id(add): replace(split, operands=(moved,), outputs=add.outputs, steps=(cut,)),
        }
        nodes = Nodes(values, [swapped.get(id(n), n) for n in nodes], derived, nodes.outputs)
    return nodes


def _tail(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without ones before the first other length."""
    first = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return shape[first:]


# -- lookups


def _lookup(nodes: Nodes, node: Node) -> tuple[Sequence[Node], Node] | None:
    """Rows by index where a library makes negative indices count from the end first, as ONNX's Gather does anyway."""
    if node.type != "Gather" or len(node.present) != 2:
        return None
    members, value = [node], node.present[1]
    while (reshape := nodes.producer(value)) is not None and reshape.type == "Reshape":
        members.append(reshape)
        value = reshape.present[0]
    where = nodes.producer(value)
    rows = nodes.values[node.present[0]].shape[0]
    if where is None or where.type != "Where" or nodes.values[where.output].known:
        return None
    for found in matches(nodes, value, ("Where", ("Less", "x", 0.0), ("Add", "x", "#rows"), "x"), Found({}, {})):
        x = found.tensors["x"]
        if found.numbers["#rows"] == rows and nodes.values[x].shape == nodes.values[node.output].shape[:-1]:
            return [*members, *found.members], replace(node, operands=(node.present[0], x))
    return None


# -- reductions


def _mean(nodes: Nodes, node: Node) -> tuple[Sequence[Node], Node] | None:
    """A sum over axes, divided by how many it adds, before or after the axes are put back with length one."""
    total = _read(nodes, node, "ReduceSum")
    between: tuple[Node, ...] = ()
    keepdims = total is not None and bool(total.attributes.get("keepdims", 1))
    if total is None and (reshape := _read(nodes, node, "Reshape")) is not None:
        total = nodes.producer(reshape.present[0])
        if total is None or total.type != "ReduceSum" or not _kept(nodes, total, reshape.output):
            return None
        between, keepdims = (reshape,), True
    if total is None:
        return None
    shape = nodes.values[total.present[0]].shape
    lengths = [shape[a] for a in total.attributes["axes"]]
    if None in lengths or _divisor(nodes, node) != float(np.prod([n or 1 for n in lengths])):
        return None
    attributes = {**total.attributes, "keepdims": int(keepdims)}
    attrs = PoolAttrs(tuple(total.attributes["axes"]), keepdims=keepdims)
    made = Node("ReduceMean", total.operands[:1], node.outputs, (), attributes, attrs, native=total.native)
    return (total, *between, node), made


def _kept(nodes: Nodes, total: Node, value: ValueId) -> bool:
    """Whether a value has the shape of a reduction's operand with its axes kept at length one."""
    shape = nodes.values[total.present[0]].shape
    axes = {a % len(shape) for a in total.attributes["axes"]}
    return nodes.values[value].shape == tuple(1 if i in axes else n for i, n in enumerate(shape))


def _average_pool(nodes: Nodes, node: Node) -> tuple[Sequence[Node], Node] | None:
    """A sum over windows, divided by their size, or by how much of each lies within the tensor."""
    total = _read(nodes, node, "SumPool")
    if total is None or not isinstance(total.attrs, PoolAttrs) or total.attrs.window is None:
        return None
    window = total.attrs.window
    divisor = _divisor(nodes, node)
    padded = any(p != (0, 0) for p in window.pads)
    if divisor is not None and divisor != float(np.prod(window.kernel)):
        return None
    if divisor is None:
        counts = nodes.values[node.operands[1] or ""].array if node.type == "Div" else None
        inside = total.attributes.get("inside")  # how many elements of each window there are
        if counts is None or inside is None or not np.array_equal(np.broadcast_to(counts, inside.shape), inside):
            return None
    attrs = replace(total.attrs, count_include_pad=padded and divisor is not None)
    made = Node("AveragePool", total.operands[:1], node.outputs, (), {}, attrs, channels=total.channels,
                native=total.native)  # fmt: skip
    return (total, node), made


def _read(nodes: Nodes, node: Node, type: str) -> Node | None:
    """The node of a type whose result a division or a product by a constant reads."""
    if node.type not in ("Div", "Mul") or len(node.present) != 2:
        return None
    for value in node.present if node.type == "Mul" else node.present[:1]:
        found = nodes.producer(value)
        if found is not None and found.type == type and not nodes.values[value].known:
            return found
    return None


def _divisor(nodes: Nodes, node: Node) -> float | None:
    numbers = [nodes.number(v) for v in node.present]
    if node.type == "Div":
        return numbers[1]
    factor = next((n for n in numbers if n is not None), None)
    return None if not factor else float(np.rint(1 / factor)) if abs(1 / factor - np.rint(1 / factor)) < 1e-3 else None


# -- softmax


def _softmax(nodes: Nodes, node: Node) -> tuple[Sequence[Node], Node] | None:
    """exp(x − max x) / Σ exp(x − max x), or without the maximum."""
    if node.type != "Div" or len(node.present) != 2:
        return None
    exp = nodes.producer(node.present[0])
    total, between = _behind(nodes, node.present[1])
    if exp is None or exp.type != "Exp" or total is None or total.type != "ReduceSum":
        return None
    axes = total.attributes["axes"]
    if total.present[0] != exp.output or len(axes) != 1:
        return None
    members, x = [node, exp, total, *between], exp.present[0]
    difference = nodes.producer(x)
    if difference is not None and difference.type == "Sub" and len(difference.present) == 2:
        top, behind = _behind(nodes, difference.present[1])
        if top is not None and top.type == "ReduceMax" and (top.present[0], top.attributes["axes"]) == (
            difference.present[0], axes,
        ):  # fmt: skip
            members += [difference, top, *behind]
            x = difference.present[0]
    axis = axes[0] % len(nodes.values[x].shape)
    return members, Node("Softmax", (x,), node.outputs, (), {"axis": axis}, AxisAttrs(axis), native="softmax")


def _behind(nodes: Nodes, value: ValueId) -> tuple[Node | None, list[Node]]:
    """What computes a value, past nodes that keep every number, and these."""
    passed: list[Node] = []
    while (node := nodes.producer(value)) is not None and not nodes.values[value].known:
        lower = node.type == "Max" and any(nodes.number(v) == -np.inf for v in node.present)
        if node.type not in ("Identity", "Reshape", "Expand") and not lower:
            return node, passed
        passed.append(node)
        value = next(v for v in node.present if not nodes.values[v].known)
    return None, passed


# -- batch norm


def _batch_norm(nodes: Nodes, node: Node) -> tuple[Sequence[Node], Node] | None:
    """(x − μ) / √(var + ε) [· γ] [+ β], with parameters for μ and var."""
    if node.type != "Sub" or len(node.present) != 2 or not nodes.values[node.present[1]].known:
        return None
    mean = nodes.root(node.present[1])
    axis = _axis(nodes, node.present[1], node.output)
    if mean is None or axis is None:
        return None
    members, roles = [node], {R.MEAN: node.present[1]}
    epsilon = None
    while (user := nodes.sole_user(members[-1].output)) is not None and len(user.present) == 2:
        other = next((v for v in user.present if v != members[-1].output), None)
        if other is None or not nodes.values[other].known:
            break
        if epsilon is None:
            scale = _deviation(nodes, other, inverse=user.type == "Mul") if user.type in ("Mul", "Div") else None
            if scale is None or (user.type == "Div" and user.present[1] != other):
                return None
            roles[R.VAR], epsilon, gamma = scale
            if gamma is not None:
                roles[R.GAMMA] = gamma
        elif user.type == "Mul" and R.GAMMA not in roles and R.BETA not in roles and nodes.root(other) is not None:
            roles[R.GAMMA] = other
        elif user.type == "Add" and R.BETA not in roles and nodes.root(other) is not None:
            roles[R.BETA] = other
        else:
            break
        members.append(user)
    if epsilon is None:
        return None
    size = nodes.values[mean[0]].array
    operands: list[ValueId | None] = [node.present[0]]
    layouts, places = {}, {}
    for role in (R.GAMMA, R.BETA, R.MEAN, R.VAR):
        value = roles.get(role)
        array = None if value is None else nodes.values[value].array
        if array is not None and (size is None or array.size != size.size):
            return None
        if array is not None:
            layouts[len(operands)] = Layout().reshaped(array.shape, (array.size,))
        places[len(operands)] = role
        operands.append(value)
    made = Node("BatchNormalization", tuple(operands), members[-1].outputs, (), {}, BatchNormAttrs(epsilon, axis),
                layouts, (axis, axis), places, native="batch_norm")  # fmt: skip
    return members, made


def _axis(nodes: Nodes, vector: ValueId, tensor: ValueId) -> int | None:
    """The axis of a tensor that a vector lies along when it is broadcast."""
    array, rank = nodes.values[vector].array, len(nodes.values[tensor].shape)
    if array is None or array.ndim > rank:
        return None
    long = [rank - array.ndim + i for i, n in enumerate(array.shape) if n != 1]
    return long[0] if len(long) == 1 else rank - 1 if not long and array.ndim else None


def _deviation(nodes: Nodes, value: ValueId, *, inverse: bool) -> tuple[ValueId, float, ValueId | None] | None:
    """√(var + ε), or its inverse, times γ: var, ε and γ."""
    node = nodes.producer(value)
    if node is None:
        return None
    if inverse and node.type in ("Mul", "Div") and len(node.present) == 2:
        a, b = node.present
        for scale, gamma in ((a, b), (b, a)) if node.type == "Mul" else ():
            found = _deviation(nodes, scale, inverse=True)
            if found is not None and found[2] is None and nodes.root(gamma) is not None:
                return found[0], found[1], gamma
        if node.type == "Div" and (bare := _deviation(nodes, b, inverse=False)) is not None:
            one = nodes.number(a) == 1
            return (*bare[:2], None if one else a) if one or nodes.root(a) is not None else None
        return None
    if node.type in ("Reshape", "Expand"):
        return _deviation(nodes, node.present[0], inverse=inverse)
    if inverse and node.type == "Reciprocal":
        return _deviation(nodes, node.present[0], inverse=False)
    power = nodes.number(node.present[1]) if node.type == "Pow" and len(node.present) == 2 else None
    if not (node.type == "Sqrt" and not inverse) and power != (-0.5 if inverse else 0.5):
        return None
    total = nodes.producer(node.present[0])
    while total is not None and total.type in ("Reshape", "Expand"):
        total = nodes.producer(total.present[0])
    if total is None or total.type != "Add" or len(total.present) != 2:
        return None
    for variance, epsilon in (total.present, total.present[::-1]):
        number = nodes.number(epsilon)
        if number is not None and nodes.root(variance) is not None:
            return variance, number, None
    return None


# -- activations


def _activation(spelled: Spelled, nodes: Nodes, node: Node) -> tuple[Sequence[Node], Node] | None:
    for found in _readings(nodes, node, spelled.patterns):
        if any(user not in found.members for m in found.members if m is not node for user in _outside(nodes, m)):
            continue
        attrs, type = spelled.attrs(found.numbers), spelled.type
        if type == "Clip" and attrs is not None:
            type = clipping(attrs.minimum, attrs.maximum)[1]
        x = found.tensors["x"]
        if nodes.values[x].shape == nodes.values[node.output].shape:
            made = Node(type, (x,), node.outputs, (), spelled.attributes(found.numbers), attrs, native=type.lower())
            return found.members, made
    return None


def _readings(nodes: Nodes, node: Node, patterns: Sequence[Any]) -> Iterator[Found]:
    for pattern in patterns:
        if pattern[0] == node.type:
            yield from matches(nodes, node.output, pattern, Found({}, {}))


def _outside(nodes: Nodes, member: Node) -> Iterator[Node]:
    for value in member.outputs:
        yield from nodes.users(value)
