"""A Keras model's calls as `bitwright.placement._masks` reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bitwright.graph import FLOAT_DTYPES, OpKind
from bitwright.placement import Extent, NodeView, masks
from bitwright_keras.graph.constants import is_constant
from bitwright_keras.graph.model import KerasModel, Node, Ref

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
            elif node.layer is None and _reads_values(node, index) and is_constant(leaf):
                operands.append(f"{node.op}\0{index}")
                constants[operands[-1]] = Extent.of(leaf)
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


def _reads_values(node: Node, place: int) -> bool:
    """Whether an op's operand at this place is of values that masks are made of, or a table of rows of one."""
    return node.type in _VALUES or (node.type == "Take" and place == 0)
