"""Small files that stand for something enormous: found before memory or time is spent on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright_onnx.graph.subgraph import bodies
from bitwright_onnx.graph.tensors import tensor_array

_NODES, _FEW, _TIMES = 1_000_000, 2_000, 100
"""A model may have so many nodes with its functions written out: more than few if the file has a hundredth of them."""
_NESTED = 100
_ELEMENTS = 2**20
_LIST = 64
"""Sizes in a list of unknown length."""
_FAR = 2.0**30
_NO_END = 2**62
"""Slices to the end are written with ends from here on."""
_SIZES = frozenset({"Add", "ConstantOfShape", "Div", "Expand", "Mul", "OneHot", "Pad", "Pow", "Range", "Reshape", "Sub",
                    "Tile"})  # fmt: skip


def check_inlined_size(model: ir.Model) -> None:
    """See that functions that call functions, written out, stay a graph of a size that can be worked with.

    Raises:
        ModelError: the model would have too many nodes, or a function calls itself.
    """
    sizes: dict[ir.OperatorIdentifier, int | None] = {}

    def size(nodes: Iterable[ir.Node], depth: int) -> int:
        total = 0
        for node in nodes:
            total += 1 + sum(size(body, depth + 1) for body in bodies(node))
            id = node.op_identifier()
            if id in model.functions:
                if id not in sizes:
                    sizes[id] = None
                    sizes[id] = None if depth > _NESTED else size(model.functions[id], depth + 1)
                known = sizes[id]
                if known is None:
                    raise ModelError(f"function {id[1]!r} calls itself, or functions are nested without end")
                total += known
        return total

    total = size(model.graph, 0)
    written = sum(len(list(ir.traversal.RecursiveGraphIterator(f))) for f in model.functions.values())
    written += len(list(ir.traversal.RecursiveGraphIterator(model.graph)))
    if total > (most := min(_NODES, max(_FEW, _TIMES * written))):
        raise ModelError(
            f"with its functions written out the model has {total:,} nodes; {most:,} are possible for the {written:,} "
            "of the file"
        )


def propagates_far(graph: ir.Graph) -> bool:
    """Whether ONNX's data propagation would write out tensors of millions of values one by one.

    It takes every tensor of one axis for a list of sizes: one that is long already, or one whose length can become
    so, since lists are joined again and again, or large numbers enter the arithmetic of sizes. Branches and bodies of
    loops are looked into, as it does.
    """
    return _states_numbers(graph, _FAR, _ELEMENTS) or _has_long_lists(graph, {})


def states_large_numbers(graph: ir.Graph) -> bool:
    """Whether sizes are computed from numbers so large that what they are of has to be known before `propagates_far`
    can tell."""
    return _states_numbers(graph, _ELEMENTS, _ELEMENTS)


def _has_long_lists(graph: ir.Graph, lengths: dict[ir.Value, int]) -> bool:
    for node in graph:
        known = [_length(v, lengths) for v in node.inputs if v is not None]
        longest = sum(known) if node.op_type == "Concat" else max(known, default=1)
        lengths.update((v, longest) for v in node.outputs)
        if any(_length(v, lengths) > _ELEMENTS for v in node.outputs):
            return True
        if any(_has_long_lists(body, lengths) for body in bodies(node)):
            return True
    return False


def _states_numbers(graph: ir.Graph, largest: float, inside: float) -> bool:
    """Whether a number beyond the largest enters the arithmetic of sizes; `inside` is that of branches and bodies."""
    for node in graph:
        if node.op_type == "Constant" and any(map(_enters_sizes, node.outputs)) and _beyond(_stated(node), largest):
            return True
        if any(_states_numbers(body, inside, inside) for body in bodies(node)):
            return True
    for value in graph.initializers.values():
        held = value.const_value
        if held is not None and held.size <= _LIST and _enters_sizes(value) and _beyond(tensor_array(held), largest):
            return True
    return False


def _stated(node: ir.Node) -> Any:
    """The whole numbers of a Constant, where it holds few."""
    for name, attribute in node.attributes.items():
        if name == "value":
            held = attribute.as_tensor()
            return tensor_array(held) if held.size <= _LIST else ()
        if name in ("value_int", "value_ints"):
            return attribute.value
    return ()


def _beyond(numbers: Any, largest: float) -> bool:
    found = np.abs(np.asarray(numbers, np.float64).reshape(-1))
    return bool((found[found < _NO_END] > largest).any())


def _length(value: ir.Value, found: Mapping[ir.Value, int]) -> int:
    """How long a tensor is at most that may be a list of sizes; 0: it has more axes."""
    if value.shape is None:
        return found.get(value, _LIST)
    if len(value.shape) != 1:
        return 0 if len(value.shape) else 1
    length = value.shape[0]
    return length if isinstance(length, int) else found.get(value, _LIST)


def forget_computed_shapes(graph: ir.Graph) -> None:
    """Forget the shapes that the file states of what is computed from initializers alone.

    What is folded is chosen by size, and a file can state any; they are inferred again from the values.
    """
    constant = set(graph.initializers.values())
    for node in graph:
        if all(v is None or v in constant for v in node.inputs):
            for value in node.outputs:
                value.shape = None
            constant.update(node.outputs)


def _enters_sizes(value: ir.Value) -> bool:
    if value.dtype not in (None, ir.DataType.INT64, ir.DataType.INT32):
        return False
    return any(user.op_type in _SIZES and user.domain == "" for user, _ in value.uses())
