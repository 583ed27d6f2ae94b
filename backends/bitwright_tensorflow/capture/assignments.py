"""Variables that inference changes, and computes with: a capture holds the value that they had when it was opened."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from bitwright.errors import ModelError
from bitwright.graph import TensorId
from bitwright_tensorflow.graph.graphs import data_operands
from bitwright_tensorflow.graph.model import VARIABLES, NodeDef, node_of

_CHANGING = ("Assign", "ResourceScatter", "Scatter", "ResourceStridedSliceAssign", "ResourceApply", "Apply")
"""What names of ops begin with that change the variable of their first operand."""
_NO_VARIABLE = frozenset({"ScatterNd", "ScatterNdNonAliasingAdd"})
_PASSING = frozenset({"Identity", "Enter", "RefEnter", "RefIdentity"})


def look_at_assignments(
    nodes: Mapping[str, NodeDef],
    inputs: Collection[TensorId],
    outputs: Sequence[TensorId],
    names: Mapping[str, str],
    *,
    whole: bool,
) -> None:
    """Refuse results that are computed with what was assigned before; tell of those whose variables are changed after.

    Args:
        nodes: of a graph without calls, by name.
        inputs, outputs: of the network.
        names: what the user calls variables, by the node that stands for them; others by that node's name.
        whole: whether all nodes run, as those of a function do, or what the outputs wait for alone.

    Raises:
        ModelError: a variable is assigned, and read after it.
    """
    computed = set(_behind(nodes, map(node_of, outputs), inputs, controls=False))
    running = nodes if whole else _behind(nodes, map(node_of, outputs), inputs, controls=True)
    changed: dict[str, list[str]] = {}
    for name in running:
        if (variable := _changed(nodes, name)) is not None:
            changed.setdefault(variable, []).append(name)
    told: dict[str, None] = {}
    for name in computed if changed else ():
        node = nodes[name]
        read = (_origin(nodes, node_of(t)) for t in data_operands(node))
        for variable in dict.fromkeys(v for v in read if v in changed):
            if variable is None or _changed(nodes, name) == variable:
                continue
            shown = names.get(variable, variable)
            waited = _behind(nodes, (i[1:] for i in node.input if i.startswith("^")), inputs, controls=True)
            if not set(waited).isdisjoint(changed[variable]):
                raise ModelError(
                    f"inference assigns to the variable {shown!r} and reads it then ({name!r}): a capture holds the "
                    "value that it had before, and would compute something else. Compute with the tensor that is "
                    "assigned, and hand what is kept in and out"
                )
            told[shown] = None
    if told:
        shown = ", ".join(map(repr, told))
        warnings.warn(
            f"inference changes variables that its results are computed from ({shown}): simulations and exports hold "
            "the values that they had when the model was opened, in every call; hand what is kept in and out",
            stacklevel=3,
        )


def _behind(
    nodes: Mapping[str, NodeDef], names: Iterable[str], inputs: Collection[TensorId], *, controls: bool
) -> Iterator[str]:
    """The nodes and all that they read, and wait for where `controls` is set, up to the inputs."""
    fed = {node_of(t) for t in inputs}
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name in fed or name not in nodes:
            continue
        seen.add(name)
        yield name
        waiting += [node_of(t) for t in data_operands(nodes[name])]
        if controls:
            waiting += [i[1:] for i in nodes[name].input if i.startswith("^")]


def _changed(nodes: Mapping[str, NodeDef], name: str) -> str | None:
    """The variable that a node changes."""
    node = nodes[name]
    if not node.op.startswith(_CHANGING) or node.op in _NO_VARIABLE:
        return None
    operands = data_operands(node)
    return _origin(nodes, node_of(operands[0])) if operands else None


def _origin(nodes: Mapping[str, NodeDef], name: str) -> str | None:
    """The variable, or the captured placeholder that stands for one, whose handle or reference this is."""
    seen = set[str]()
    while name in nodes and name not in seen:
        seen.add(name)
        node = nodes[name]
        if node.op in VARIABLES or node.op == "Placeholder":
            return name
        operands = data_operands(node)
        if node.op not in _PASSING or not operands:
            return None
        name = node_of(operands[0])
    return None
