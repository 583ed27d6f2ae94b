"""Constant operands of `keras.ops` operations: numbers and arrays among a call's arguments that are parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright_keras.graph.model import Node

BINARY = frozenset({"Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum", "Power", "Matmul"})
"""Operations whose constant operand is data; of others, constants are settings."""


def constant_params(node: Node) -> Node:
    """The node with parameter ids for its constant operands."""
    if node.layer is not None or node.type not in BINARY:
        return node
    found = [
        *(f"args/{i}" for i, x in enumerate(node.args) if is_constant(x)),
        *(f"kwargs/{k}" for k, x in node.kwargs.items() if is_constant(x)),
    ]
    ids = [f"{node.op}/constant" if i == 0 else f"{node.op}/constant_{i}" for i in range(len(found))]
    return replace(node, params={**node.params, **dict(zip(found, ids, strict=True))})


def is_constant(x: Any) -> bool:
    """Whether an argument is a float constant (whole numbers written in code count as such)."""
    if isinstance(x, bool):
        return False
    return isinstance(x, int | float | np.floating) or (isinstance(x, np.ndarray) and x.dtype.kind == "f")


def constant_of(node: Node, key: str) -> Any:
    """The value of a constant operand, as the call holds it."""
    where, _, name = key.partition("/")
    return node.args[int(name)] if where == "args" else node.kwargs[name]


def with_constant(node: Node, key: str, value: NDArray[Any]) -> Node:
    """The node with another constant: a Python number where it is a scalar, so that no type is promoted."""
    where, _, name = key.partition("/")
    held = constant_of(node, key)
    given: Any = float(value) if value.ndim == 0 else value.astype(getattr(held, "dtype", np.float32))
    if where == "args":
        index = int(name)
        return replace(node, args=(*node.args[:index], given, *node.args[index + 1 :]))
    return replace(node, kwargs={**node.kwargs, name: given})
