"""Constant operands of `keras.ops` operations: numbers and arrays among a call's arguments that are parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright_keras.graph.model import Node

BINARY = frozenset({"Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum", "Power", "Matmul"})
"""Operations whose constant operand is data; of others, constants are settings."""
JOINS = frozenset({"Concatenate", "Stack"})
"""Operations of a list of operands, arrays among which are data."""


def constant_params(node: Node) -> Node:
    """The node with parameter ids for its constant operands."""
    if node.layer is not None or node.type not in BINARY | JOINS:
        return node
    found = [
        *(f"args/{i}" for i, x in enumerate(node.args) if is_constant(x)),
        *(f"kwargs/{k}" for k, x in node.kwargs.items() if is_constant(x)),
    ]
    if node.type in JOINS:
        parts = node.args[0] if node.args and isinstance(node.args[0], list | tuple) else ()
        found = [f"args/0/{i}" for i, x in enumerate(parts) if isinstance(x, np.ndarray) and is_constant(x)]
    ids = [f"{node.op}/constant" if i == 0 else f"{node.op}/constant_{i}" for i in range(len(found))]
    return replace(node, params={**node.params, **dict(zip(found, ids, strict=True))})


def is_constant(x: Any) -> bool:
    """Whether an argument is a float constant (whole numbers written in code count as such)."""
    if isinstance(x, bool):
        return False
    return isinstance(x, int | float | np.floating) or (isinstance(x, np.ndarray) and x.dtype.kind == "f")


def constant_of(node: Node, key: str) -> Any:
    """The value of a constant operand, as the call holds it."""
    where, *path = key.split("/")
    value: Any = node.args if where == "args" else node.kwargs
    for step in path:
        value = value[int(step)] if isinstance(value, list | tuple) else value[step]
    return value


def with_operand(node: Node, key: str, value: Any) -> Node:
    """The node with something else in the place of a constant operand."""
    where, *path = key.split("/")
    if where == "args":
        return replace(node, args=_put(node.args, path, value))
    return replace(node, kwargs=_put(node.kwargs, path, value))


def _put(held: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    if isinstance(held, list | tuple):
        index = int(path[0])
        return type(held)((*held[:index], _put(held[index], path[1:], value), *held[index + 1 :]))
    return {**held, path[0]: _put(held[path[0]], path[1:], value)}


def with_constant(node: Node, key: str, value: NDArray[Any]) -> Node:
    """The node with another constant: a Python number where it is a scalar, so that no type is promoted."""
    held = constant_of(node, key)
    given: Any = float(value) if value.ndim == 0 else value.astype(getattr(held, "dtype", np.float32))
    return with_operand(node, key, given)
