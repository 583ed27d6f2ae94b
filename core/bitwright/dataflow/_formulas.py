"""Activations that models spell out in elementary functions, as patterns, and how they are matched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.dataflow._nodes import Node, Nodes, ValueId
from bitwright.graph import ActivationAttrs, clipping

Pattern = Any
"""A number, "x" for a tensor, "#name" for a number to be read, or (type, operands…); types as in ONNX."""
_COMMUTATIVE = frozenset({"Add", "Mul", "Max", "Min"})


@dataclass(frozen=True)
class Found:
    """A match: values by name, numbers by name, and the nodes that it is made of."""

    tensors: Mapping[str, ValueId]
    numbers: Mapping[str, float]
    members: tuple[Node, ...] = ()


def matches(nodes: Nodes, value: ValueId | None, pattern: Pattern, found: Found) -> Iterator[Found]:
    """All ways to read a value as a pattern that agree with what has been found so far."""
    if isinstance(pattern, float | int):
        number = nodes.number(value)
        if number is not None and math.isclose(number, pattern, rel_tol=1e-4, abs_tol=1e-12):
            yield found
    elif isinstance(pattern, str) and pattern.startswith("#"):
        number = nodes.number(value)
        if number is not None and found.numbers.get(pattern, number) == number:
            yield Found(found.tensors, {**found.numbers, pattern: number}, found.members)
    elif isinstance(pattern, str):
        if value is not None and not nodes.values[value].known and found.tensors.get(pattern, value) == value:
            yield Found({**found.tensors, pattern: value}, found.numbers, found.members)
    else:
        type, *parts = pattern
        node = nodes.producer(value)
        if node is None or node.type != type or len(node.operands) != len(parts) or nodes.values[node.output].known:
            return
        orders = itertools.permutations(parts) if type in _COMMUTATIVE else (parts,)
        for order in orders:
            states = iter((Found(found.tensors, found.numbers, (*found.members, node)),))
            for operand, part in zip(node.operands, order, strict=True):
                states = _each(nodes, states, operand, part)
            yield from states


def _each(nodes: Nodes, states: Iterator[Found], operand: ValueId | None, part: Pattern) -> Iterator[Found]:
    for state in states:
        yield from matches(nodes, operand, part, state)


@dataclass(frozen=True)
class Spelled:
    """An activation as models spell it out.

    Attributes:
        type: of ONNX; "Clip" stands for what its bounds make of it.
        patterns: of which one must match, the largest first.
        attributes, attrs: of the op, from the numbers that were read.
    """

    type: str
    patterns: tuple[Pattern, ...]
    attributes: Callable[[Mapping[str, float]], Mapping[str, Any]] = lambda numbers: {}
    attrs: Callable[[Mapping[str, float]], ActivationAttrs | None] = lambda numbers: None


def _half(x: Pattern, other: Pattern) -> tuple[Pattern, ...]:
    """x · ½ · other, in any order."""
    return (
        ("Mul", ("Mul", 0.5, x), other),
        ("Mul", x, ("Mul", 0.5, other)),
        ("Mul", 0.5, ("Mul", x, other)),
        ("Mul", ("Div", x, 2.0), other),
    )


_ROOT = math.sqrt(0.5)
_SCALED = (("Mul", "x", _ROOT), ("Div", "x", math.sqrt(2.0)))
_CUBES = (("Pow", "x", 3.0), ("Mul", ("Mul", "x", "x"), "x"))
_ARGUMENTS = tuple(("Mul", math.sqrt(2 / math.pi), ("Add", "x", ("Mul", 0.044715, cube))) for cube in _CUBES)
_RELU6 = (("Min", ("Max", ("Add", "x", 3.0), 0.0), 6.0), ("Max", ("Min", ("Add", "x", 3.0), 6.0), 0.0))
_HARD = tuple(p for r in _RELU6 for p in (("Div", r, 6.0), ("Mul", r, 1 / 6)))
_LOG = ("Log1p", ("Exp", ("Neg", ("Abs", ("Sub", "x", 0.0)))))
_SOFTPLUS = (
    ("Where", ("NotEqual", ("Sub", "x", 0.0), ("Sub", "x", 0.0)), ("Add", "x", 0.0), ("Add", ("Max", "x", 0.0), _LOG)),
    ("Add", ("Max", "x", 0.0), ("Log1p", ("Exp", ("Neg", ("Abs", "x"))))),
    ("Log", ("Add", 1.0, ("Exp", "x"))),
)


def _alpha(numbers: Mapping[str, float]) -> Mapping[str, Any]:
    return {"alpha": numbers["#alpha"]}


def _bounds(numbers: Mapping[str, float]) -> ActivationAttrs:
    return clipping(numbers.get("#low", 0.0), numbers.get("#high"))[2]


SPELLED: tuple[Spelled, ...] = (
    Spelled(
        "Gelu",
        tuple(p for a in _ARGUMENTS for p in _half("x", ("Add", 1.0, ("Tanh", a)))),
        lambda numbers: {"approximate": "tanh"},
    ),
    Spelled(
        "Gelu",
        (
            *(p for s in _SCALED for p in _half("x", ("Add", 1.0, ("Erf", s)))),
            *(p for n in (("Mul", ("Neg", "x"), _ROOT), ("Neg", _SCALED[0]), ("Neg", _SCALED[1]))
              for p in _half("x", ("Erfc", n))),
        ),
    ),
    Spelled(
        "HardSwish",
        (
            *(("Mul", "x", h) for h in _HARD),
            *(p for r in _RELU6 for p in (("Div", ("Mul", "x", r), 6.0), ("Mul", ("Mul", "x", r), 1 / 6))),
        ),
    ),
    Spelled("HardSigmoid", _HARD, lambda numbers: {"alpha": 1 / 6, "beta": 0.5}),
    Spelled("Mish", tuple(("Mul", "x", ("Tanh", s)) for s in _SOFTPLUS)),
    Spelled("Softplus", _SOFTPLUS),
    Spelled(
        "Swish",
        (("Mul", "x", ("Sigmoid", "x")), ("Div", "x", ("Add", 1.0, ("Exp", ("Neg", "x"))))),
    ),
    Spelled("Sigmoid", (("Div", 1.0, ("Add", 1.0, ("Exp", ("Neg", "x")))),)),
    Spelled(
        "LeakyRelu",
        (
            ("Where", ("GreaterOrEqual", "x", 0.0), "x", ("Mul", "#alpha", "x")),
            ("Where", ("Greater", "x", 0.0), "x", ("Mul", "#alpha", "x")),
            ("Where", ("Less", "x", 0.0), ("Mul", "#alpha", "x"), "x"),
        ),
        _alpha,
        lambda numbers: ActivationAttrs(alpha=numbers["#alpha"]),
    ),
    Spelled(
        "Elu",
        (
            ("Where", ("Greater", "x", 0.0), "x",
             ("Mul", "#alpha", ("Expm1", ("Where", ("Greater", "x", 0.0), 0.0, "x")))),
            ("Where", ("Greater", "x", 0.0), "x", ("Mul", "#alpha", ("Expm1", "x"))),
        ),
        _alpha,
    ),
    Spelled(
        "Clip",
        (("Min", ("Max", "x", "#low"), "#high"), ("Max", ("Min", "x", "#high"), "#low")),
        attrs=_bounds,
    ),
    Spelled("Clip", (("Max", "x", 0.0),), attrs=_bounds),
)  # fmt: skip
"""Each before those that are parts of it."""
