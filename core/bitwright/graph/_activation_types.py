"""The activations that an edit may put in another's place: every backend makes all, of simpler ops if need be."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph._graph import ActivationAttrs, OpKind

ACTIVATION_KINDS = frozenset(
    {OpKind.RELU, OpKind.CLIPPED_RELU, OpKind.PRELU, OpKind.ACTIVATION, OpKind.IDENTITY}
)  # fmt: skip
"""What can be replaced: elementwise functions of one tensor."""

Array = NDArray[Any]
_LARGEST = float(np.finfo(np.float32).max)
LEAK = 0.01
"""α of `LeakyRelu` (ONNX's and PyTorch's default)."""


@dataclass(frozen=True)
class ActivationType:
    """An activation.

    Attributes:
        kind, type, attrs: how a graph shows it (`Op`).
        compute: its values, in the dtype of floats given (float32 or float64).
    """

    kind: OpKind
    type: str
    compute: Callable[[Array], Array]
    attrs: ActivationAttrs | None = None


erf = np.vectorize(math.erf, otypes=[np.float64])
_SELU = 1.0507009873554805, 1.6732632423543772
"""γ and α (Klambauer et al. 2017, "Self-Normalizing Neural Networks")."""


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # 1 / ∞ is the right 0
        return np.asarray(1 / (1 + np.exp(-x)), x.dtype)


def _hard_sigmoid(x: Array) -> Array:
    return np.asarray(np.clip(x / np.float32(6) + np.float32(0.5), 0, 1), x.dtype)


def _below(x: Array, positive: float, negative: float) -> Array:
    """positive · x, and negative · (eˣ − 1) below zero."""
    return np.asarray(np.where(x > 0, positive * x, negative * np.expm1(np.minimum(x, 0))), x.dtype)


def _softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(x, np.zeros_like(x)))


def _gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))), x.dtype)


def _other(type: str, compute: Callable[[Array], Array]) -> ActivationType:
    return ActivationType(OpKind.ACTIVATION, type, compute)


ACTIVATION_TYPES: Mapping[str, ActivationType] = {
    "Identity": ActivationType(OpKind.IDENTITY, "Identity", lambda x: x),
    "Relu": ActivationType(OpKind.RELU, "Relu", lambda x: np.maximum(x, x.dtype.type(0))),
    "Relu6": ActivationType(
        OpKind.CLIPPED_RELU, "Clip", lambda x: np.asarray(np.clip(x, 0, 6), x.dtype), ActivationAttrs(0.0, 6.0)
    ),
    "LeakyRelu": ActivationType(
        OpKind.PRELU, "LeakyRelu", lambda x: np.where(x < 0, x * x.dtype.type(LEAK), x), ActivationAttrs(alpha=LEAK)
    ),
    "Elu": _other("Elu", lambda x: _below(x, 1.0, 1.0)),
    "Selu": _other("Selu", lambda x: _below(x, _SELU[0], _SELU[0] * _SELU[1])),
    "Sigmoid": _other("Sigmoid", _sigmoid),
    "HardSigmoid": _other("HardSigmoid", _hard_sigmoid),
    "Tanh": _other("Tanh", np.tanh),
    "Softplus": _other("Softplus", _softplus),
    "Softsign": _other("Softsign", lambda x: np.asarray(x / (1 + np.abs(x)))),
    "Gelu": _other("Gelu", _gelu),
    "Swish": _other("Swish", lambda x: np.asarray(x * _sigmoid(x))),
    "HardSwish": _other("HardSwish", lambda x: np.asarray(x * _hard_sigmoid(x))),
    "Mish": _other("Mish", lambda x: np.asarray(x * np.tanh(_softplus(x)))),
}
"""By the name that `edits.ReplaceActivation` takes: ONNX's operator (onnx/docs/Operators.md), and Relu6 for the clip.
Gelu is the exact form, not the one with tanh; HardSigmoid is that of HardSwish, PyTorch and Keras, with α = 1/6."""


def clipping(low: float | None, high: float | None) -> tuple[OpKind, str, ActivationAttrs]:
    """Kind, type and attributes of a clip by its bounds: (0, m) is a clipped ReLU, (0, ∞) a ReLU, all else neither.

    None, ∞ and the largest float32, which exporters write for it, are open ends.
    """
    low, high = (None if b is None or abs(b) >= _LARGEST else float(b) for b in (low, high))
    attrs = ActivationAttrs(low, high)
    if low == 0 and high is None:
        return OpKind.RELU, "Relu", attrs
    return OpKind.CLIPPED_RELU if low == 0 and high is not None and high > 0 else OpKind.ACTIVATION, "Clip", attrs


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
