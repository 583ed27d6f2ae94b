"""Loops and conditions of TF 1 graphs (Enter … Exit, Switch … Merge): which nodes lie inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitwright_tensorflow.graph.graphs import Wiring
from bitwright_tensorflow.graph.model import node_of

OPENING = frozenset({"Enter", "RefEnter", "Switch", "RefSwitch"})
CLOSING = frozenset({"Exit", "RefExit", "Merge", "RefMerge"})
_BACK = frozenset({"NextIteration", "RefNextIteration"})


def regions(wiring: Wiring, order: Sequence[str]) -> list[tuple[str, ...]]:
    """The nodes of each outermost loop or condition, boundary included, in topological order.

    Depth rises at Enter and at a condition's Switch and falls at Exit and at a condition's Merge; the Switch and the
    Merge of a loop's head change nothing.
    """
    inside = set(order)
    depth: dict[str, int] = {}
    marked: list[str] = []
    # Control dependencies place constants inside of a branch, so they come from the whole order and not only data.
    for name in in_order(wiring, order):
        node = wiring.nodes[name]
        above = max((depth.get(node_of(i), 0) for i in node.input if not is_back(wiring, i)), default=0)
        if node.op in OPENING and not _of_loop(wiring, name):
            above += 1
        deep = above > 0
        if node.op in CLOSING and not _of_loop(wiring, name):
            above -= 1
        depth[name] = max(above, 0)
        if deep and name in inside:
            marked.append(name)
    return _components(wiring, marked, depth)


def is_back(wiring: Wiring, operand: str) -> bool:
    """Whether an operand comes from a loop's last round."""
    node = wiring.nodes.get(node_of(operand))
    return node is not None and node.op in _BACK


def _of_loop(wiring: Wiring, name: str) -> bool:
    """Whether a Merge is a loop's head, or a Switch hangs on one."""
    node = wiring.nodes[name]
    if node.op in ("Merge", "RefMerge"):
        return any(is_back(wiring, i) for i in node.input)
    if node.op in ("Switch", "RefSwitch"):
        predicate = wiring.nodes.get(node_of(node.input[1]))
        return predicate is not None and predicate.op == "LoopCond"
    return False


def in_order(wiring: Wiring, order: Sequence[str]) -> list[str]:
    """The order, with control dependencies respected too."""
    done: set[str] = set()
    result: list[str] = []
    for first in order:
        stack = [(first, False)]
        while stack:
            name, finished = stack.pop()
            if finished:
                result.append(name)
                continue
            if name in done or name not in wiring.nodes:
                continue
            done.add(name)
            stack.append((name, True))
            before = [node_of(i) for i in wiring.nodes[name].input if not is_back(wiring, i)]
            stack += [(source, False) for source in before if source not in done]
    return result


def _components(wiring: Wiring, marked: Sequence[str], depth: Mapping[str, int]) -> list[tuple[str, ...]]:
    root = {name: name for name in marked}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    for name in marked:
        for operand in wiring.nodes[name].input:
            source = node_of(operand)
            if source in root and (depth[source] > 0 or is_back(wiring, operand)):
                root[find(name)] = find(source)
    # Branches of one condition hang together by its predicate, even where no tensor joins them.
    by_predicate: dict[str, str] = {}
    for name in marked:
        node = wiring.nodes[name]
        if node.op in ("Switch", "RefSwitch"):
            first = by_predicate.setdefault(node.input[1], name)
            root[find(name)] = find(first)
    groups: dict[str, list[str]] = {}
    for name in marked:
        groups.setdefault(find(name), []).append(name)
    return [tuple(group) for group in groups.values()]
