"""A Keras model's calls as `bitwright.placement._masks` reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from bitwright.graph import FLOAT_DTYPES, OpKind
from bitwright.placement import Extent, NodeView, masks
from bitwright_keras.graph.constants import is_constant
from bitwright_keras.graph.model import KerasModel, Node, Ref, variables_of

_TYPES = {"Isnan": "IsNaN", "Isinf": "IsInf", "Isfinite": "IsFinite", "NanToNum": "NanToNum", "Argmax": "ArgMax",
          "TopK": "TopK", "Tril": "Trilu", "Triu": "Trilu", "FullLike": "ConstantOfShape"}  # fmt: skip
_VALUES = frozenset({"Where", "Add", "Subtract", "Multiply", "Divide", "TrueDivide", "FullLike", "Pad", "Power"})
"""Operations among whose arguments numbers are values; of others they are settings."""


def mask_names(model: KerasModel, kind_of: Callable[[Node], tuple[OpKind, str]]) -> frozenset[str]:
    """Ids of the activations that are masks or masked (see `bitwright.placement._masks`)."""
    steps: list[NodeView] = []
    constants: dict[str, Extent] = {}
    for node in model.nodes:
        kind, type = kind_of(node)
        operands: list[str] = []
        for index, leaf in enumerate(_leaves((node.args, dict(node.kwargs)))):
            if isinstance(leaf, Ref):
                operands.append(leaf.id)
            elif node.layer is None and _is_float(leaf) and (node.type in _VALUES or (_looks_up(node) and index == 0)):
                operands.append(f"{node.op}\0{index}")
                constants[operands[-1]] = Extent.of_table(np.asarray(leaf)) if _looks_up(node) else Extent.of(leaf)
        if (table := _table(node, kind)) is not None:
            extent = Extent.of_table(table, keras.ops.convert_to_numpy)
            if kind is OpKind.EMBEDDING or extent.offset:
                operands.insert(0, f"{node.op}\0table")
                constants[operands[0]] = extent
                kind, type = _use(kind, node, model)
        steps.append(NodeView(kind, _TYPES.get(node.type, type), tuple(operands), node.outputs))
    specs = model.specs
    return masks(
        steps, model.inputs, model.output_ids, constants,
        lambda name: name in specs and specs[name].dtype in FLOAT_DTYPES,
    )  # fmt: skip


def _leaves(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, tuple | list):
        for item in arguments:
            yield from _leaves(item)
    elif isinstance(arguments, dict):
        for item in arguments.values():
            yield from _leaves(item)
    else:
        yield arguments


def _looks_up(node: Node) -> bool:
    """Whether an op makes its result of parts of its first operand."""
    return node.type in ("Take", "TakeAlongAxis", "Slice")


def _is_float(leaf: Any) -> bool:
    return is_constant(leaf) or (isinstance(leaf, np.ndarray) and leaf.dtype.name in FLOAT_DTYPES)


def _table(node: Node, kind: OpKind) -> keras.Variable | None:
    """An embedding layer's table; the only variable of a layer of which nobody knows what it computes."""
    if node.layer is None or kind not in (OpKind.EMBEDDING, OpKind.OPAQUE):
        return None
    found = [v for v in variables_of(node.layer).values() if keras.backend.standardize_dtype(v.dtype) in FLOAT_DTYPES]
    return found[0] if len(found) == 1 else None


def _use(kind: OpKind, node: Node, model: KerasModel) -> tuple[OpKind, str]:
    """What a layer does with its table: it looks rows up in it, or adds it where it is given a signal."""
    given = any(model.specs[t].dtype in FLOAT_DTYPES for t in node.inputs)
    return (OpKind.ADD, "Add") if given and kind is OpKind.OPAQUE else (OpKind.SLICE, "Gather")
