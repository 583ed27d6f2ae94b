"""The activations that an edit may put in another's place: every backend makes all, of simpler ops if need be."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

from bitwright.graph._graph import ActivationAttrs, OpKind

ACTIVATION_KINDS = frozenset(
    {OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.IDENTITY}
)  # fmt: skip
"""What can be replaced: elementwise functions of one tensor."""

LEAK = 0.01
"""α of `LeakyRelu` (ONNX's and PyTorch's default)."""


@dataclass(frozen=True)
class ActivationType:
    """How an activation is shown in a graph.

    Attributes:
        kind, type, attrs: see `bitwright.graph.Op`.
        formula: what it computes.
    """

    kind: OpKind
    type: str
    formula: str
    attrs: ActivationAttrs | None = None


def _other(type: str, formula: str) -> ActivationType:
    return ActivationType(OpKind.ACTIVATION, type, formula)


ACTIVATION_TYPES: Mapping[str, ActivationType] = {
    "Identity": ActivationType(OpKind.IDENTITY, "Identity", "x"),
    "Relu": ActivationType(OpKind.RELU, "Relu", "max(x, 0)"),
    "Relu6": ActivationType(OpKind.CLIPPED_RELU, "Clip", "min(max(x, 0), 6)", ActivationAttrs(0.0, 6.0)),
    "LeakyRelu": ActivationType(
        OpKind.PRELU, "LeakyRelu", "x for x ≥ 0, 0.01 x below", ActivationAttrs(alpha=LEAK)
    ),
    "Elu": _other("Elu", "x for x ≥ 0, eˣ − 1 below"),
    "Selu": _other("Selu", "1.0507 x for x ≥ 0, 1.0507 · 1.67326 (eˣ − 1) below"),
    "Sigmoid": _other("Sigmoid", "1 / (1 + e⁻ˣ)"),
    "HardSigmoid": _other("HardSigmoid", "min(max(x + 3, 0), 6) / 6, as in PyTorch, Keras and HardSwish"),
    "Tanh": _other("Tanh", "tanh x"),
    "Softplus": _other("Softplus", "ln(1 + eˣ)"),
    "Softsign": _other("Softsign", "x / (1 + |x|)"),
    "Gelu": _other("Gelu", "x (1 + erf(x/√2)) / 2"),
    "Swish": _other("Swish", "x / (1 + e⁻ˣ)"),
    "HardSwish": _other("HardSwish", "x min(max(x + 3, 0), 6) / 6"),
    "Mish": _other("Mish", "x tanh(ln(1 + eˣ))"),
}  # fmt: skip
"""By the name that `edits.ReplaceActivation` takes: ONNX's operator (specification: onnx/docs/Operators.md), and Relu6
for the clip. Exact forms: no tanh approximation of Gelu."""


@dataclass(frozen=True)
class Formula:
    """An elementwise function of one tensor, as calls of simpler ones.

    Attributes:
        type: a name of `ACTIVATION_TYPES`, or Abs, Erf, Add, Mul, Div.
        operands: formulas, numbers, or X for the tensor.
    """

    type: str
    operands: tuple[Formula | float | None, ...]


X = None
"""The tensor, as an operand of a `Formula`."""

_SPELLED: Mapping[str, Formula] = {
    "HardSigmoid": Formula("Div", (Formula("Relu6", (Formula("Add", (X, 3.0)),)), 6.0)),
    "HardSwish": Formula("Mul", (X, Formula("HardSigmoid", (X,)))),
    "Swish": Formula("Mul", (X, Formula("Sigmoid", (X,)))),
    "Mish": Formula("Mul", (X, Formula("Tanh", (Formula("Softplus", (X,)),)))),
    "Softsign": Formula("Div", (X, Formula("Add", (Formula("Abs", (X,)), 1.0)))),
    "Gelu": Formula(
        "Mul",
        (Formula("Mul", (X, 0.5)), Formula("Add", (Formula("Erf", (Formula("Mul", (X, math.sqrt(0.5))),)), 1.0))),
    ),
}
"""What frameworks may lack; all have the other activations, Abs and Erf."""


def formula(type: str, has: Container[str]) -> Formula:
    """An activation in the functions that a framework has.

    Args:
        type: of `ACTIVATION_TYPES`.
        has: those of these that the framework has as one op.
    """
    return Formula(type, (X,)) if type in has or type not in _SPELLED else _expanded(_SPELLED[type], has)


def _expanded(given: Formula, has: Container[str]) -> Formula:
    if given.type in _SPELLED and given.type not in has and given.operands == (X,):
        return _expanded(_SPELLED[given.type], has)
    return Formula(given.type, tuple(_expanded(o, has) if isinstance(o, Formula) else o for o in given.operands))
