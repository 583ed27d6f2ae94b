"""A captured graph's nodes as `bitwright.placement._masks` reads them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitwright.graph import FLOAT_DTYPES, OpKind
from bitwright.placement import UNREAD, Extent, NodeView, masks
from bitwright_torch.graph.model import info
from bitwright_torch.graph.naming import call_name
from bitwright_torch.graph.operands import Operand
from bitwright_torch.graph.optable import kind_of

_FILLING = frozenset({"full", "full_like", "new_full", "scalar_tensor", "fill"})
_TYPES = {"isnan": "IsNaN", "isinf": "IsInf", "isfinite": "IsFinite", "nan_to_num": "NanToNum", "argmax": "ArgMax",
          "topk": "TopK", "baddbmm": "Add"}  # fmt: skip
_LOOKUP = (OpKind.SLICE, "Gather")
"""What an embedding is here, as any other op that makes its result of rows of a table."""
_WHOLE_NUMBERS = frozenset({"Where", "Add", "Sub", "Mul", "Div", "ConstantOfShape"})
"""Types among whose arguments a whole number is a value; of others it is an axis or a size."""


def mask_nodes(graph: fx.Graph, held: Mapping[fx.Node, Operand], model: nn.Module) -> frozenset[fx.Node]:
    """Nodes, parameters among them, that are masks or masked (see `bitwright.placement._masks`)."""
    steps: list[NodeView] = []
    constants: dict[str, Extent] = {}
    nodes = {node.name: node for node in graph.nodes}
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    for node in graph.nodes:
        if node in held:
            uses = {_classified(user) for user in node.users if user.op == "call_function" and user not in held}
            if uses := {use for use in uses if use[0] not in UNREAD}:
                value = held[node].view(model)
                constants[node.name] = Extent.of_table(value, _array) if uses == {_LOOKUP} else Extent.of(_array(value))
        elif node.op == "call_function":
            kind, type = _classified(node)
            operands = []
            for index, argument in enumerate(node.args):
                if isinstance(argument, float) or (type in _WHOLE_NUMBERS and _is_whole(argument)):
                    operands.append(f"{node.name}\0{index}")
                    constants[operands[-1]] = Extent.of(float(argument))
                else:
                    found: list[str] = []
                    fx.node.map_arg(argument, lambda n, found=found: found.append(n.name))  # type: ignore[misc]
                    operands += found
            fx.node.map_arg(node.kwargs, lambda n, operands=operands: operands.append(n.name))  # type: ignore[misc]
            steps.append(NodeView(kind, type, tuple(operands), (node.name,)))
    ends: list[fx.Node] = []
    fx.node.map_arg(graph.output_node().args, ends.append)
    found_names = masks(
        steps, inputs, [n.name for n in ends], constants,
        lambda name: name in nodes and nodes[name] not in held and _is_float(nodes[name]),
    )  # fmt: skip
    return frozenset(nodes[name] for name in found_names if name in nodes)


def _classified(node: fx.Node) -> tuple[OpKind, str]:
    name = call_name(node)
    if node.target is operator.getitem:
        return OpKind.IDENTITY, "Identity"
    if name in _FILLING:
        return OpKind.OPAQUE, "ConstantOfShape"
    if name == "embedding":
        return _LOOKUP
    if name == "baddbmm":
        return OpKind.ADD, "Add"
    kind, type = kind_of(node)
    return kind, _TYPES.get(name, type)


def _array(tensor: Tensor) -> NDArray[Any]:
    """A tensor's values in a type that numpy has."""
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return np.asarray(wide.cpu().numpy())


def _is_whole(argument: object) -> bool:
    return isinstance(argument, int) and not isinstance(argument, bool)


def _is_float(node: fx.Node) -> bool:
    if info(node).dtype in FLOAT_DTYPES:
        return True
    return any(user.target is operator.getitem and info(user).dtype in FLOAT_DTYPES for user in node.users)
