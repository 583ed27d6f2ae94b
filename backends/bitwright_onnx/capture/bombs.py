"""Small files that stand for something enormous: found before memory or time is spent on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    so, since lists are joined again and again, or large numbers enter the arithmetic of sizes.
    """
    lengths: dict[ir.Value, int] = {}
    for node in graph:
        known = [_length(v, lengths) for v in node.inputs if v is not None]
        longest = sum(known) if node.op_type == "Concat" else max(known, default=1)
        lengths.update((v, longest) for v in node.outputs)
        if any(_length(v, lengths) > _ELEMENTS for v in node.outputs):
            return True
    for value in graph.initializers.values():
        if value.const_value is None or value.const_value.size > 64 or not _enters_sizes(value):
            continue
        numbers = np.abs(np.asarray(tensor_array(value.const_value), np.float64))
        numbers = numbers[(numbers > 1) & (numbers < _NO_END)]
        if numbers.size and numbers.max() > _FAR:
            return True
    return False


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
    if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return False
    return any(user.op_type in _SIZES and user.domain == "" for user, _ in value.uses())
