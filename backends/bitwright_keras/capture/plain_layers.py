"""Layers in place of `keras.ops` calls: what an .h5 file can hold, which knows layers only.

The normal form spells preprocessing layers, attention and users' own `keras.ops` calls out as operations. Those that
one of Keras's own layers computes become that layer again, under the operation's name; others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from bitwright_keras.graph.model import KerasModel, Node, Ref, Spec

_MERGES = {
    "Add": keras.layers.Add,
    "Subtract": keras.layers.Subtract,
    "Multiply": keras.layers.Multiply,
    "Maximum": keras.layers.Maximum,
    "Minimum": keras.layers.Minimum,
}
_ACTIVATIONS = {
    "Relu": "relu",
    "Relu6": "relu6",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Silu": "silu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Exp": "exponential",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
}

Made = tuple[keras.layers.Layer, tuple[Any, ...]]
"""A layer and what it is called with."""


@dataclass(frozen=True)
class _Call:
    """A call of an operation.

    Attributes:
        node: the call.
        specs: of the model's activations.
    """

    node: Node
    specs: Mapping[str, Spec]

    @property
    def operation(self) -> Any:
        return self.node.operation

    @property
    def given(self) -> tuple[Any, ...]:
        """Its arguments, by position and then by name."""
        return (*self.node.args, *self.node.kwargs.values())

    @property
    def out(self) -> Spec:
        return self.specs[self.node.outputs[0]]

    @property
    def settings(self) -> dict[str, Any]:
        """What the layer in its place has whatever it is."""
        return {"name": self.operation.name, "dtype": self.out.dtype}


def with_layers(model: KerasModel) -> KerasModel:
    """The model with layers for the operations that have one.

    A division by a constant becomes a product with its reciprocal, which may differ in the last bit; everything else
    computes the same numbers.
    """
    return model.with_(nodes=tuple(_replaced(node, model.specs) for node in model.nodes))


def _replaced(node: Node, specs: Mapping[str, Spec]) -> Node:
    maker = None if node.layer is not None or len(node.outputs) != 1 else _MAKERS.get(node.type)
    call = _Call(node, specs)
    if maker is None or not call.out.dtype.startswith(("float", "bfloat")):
        return node
    made = maker(call)
    return node if made is None else replace(node, operation=made[0], args=made[1], kwargs={}, params={})


def _binary(call: _Call) -> Made | None:
    if len(call.given) != 2:
        return None
    return _merge(call) if all(isinstance(x, Ref) for x in call.given) else _rescaling(call)


def _rescaling(call: _Call) -> Made | None:
    """x · scale + offset with constants."""
    first = isinstance(call.given[0], Ref)
    x, constant = call.given if first else call.given[::-1]
    if not isinstance(x, Ref) or not isinstance(constant, int | float | np.ndarray | np.generic):
        return None
    if call.specs[x.id].shape != call.out.shape:  # the constant widens it
        return None
    value = np.asarray(constant, np.float64)
    scale, offset = np.ones(()), np.zeros(())
    match call.node.type:
        case "Add":
            offset = value
        case "Subtract":
            scale, offset = (scale, -value) if first else (-scale, value)
        case "Multiply":
            scale = value
        case "Divide" | "TrueDivide" if first and (value != 0).all():
            scale = 1 / value
        case _:
            return None
    numbers = (np.asarray(v, np.float32).tolist() for v in (scale, offset))
    return keras.layers.Rescaling(*numbers, **call.settings), (x,)


def _merge(call: _Call) -> Made | None:
    """Of two tensors. Of different ranks these layers line up axes otherwise than broadcasting does."""
    given = [call.specs[x.id] for x in call.given]
    alike = all(len(s.shape) == len(call.out.shape) and s.dtype == call.out.dtype for s in given)
    # What broadcasts along the batch isn't a layer's to combine.
    if call.node.type not in _MERGES or not alike or any(s.shape[0] != call.out.shape[0] for s in given):
        return None
    return _MERGES[call.node.type](**call.settings), (list(call.given),)


def _activation(call: _Call) -> Made | None:
    if len(call.given) != 1:
        return None
    return keras.layers.Activation(_ACTIVATIONS[call.node.type], **call.settings), call.given


def _transpose(call: _Call) -> Made | None:
    axes = call.operation.axes
    if axes is None or axes[0] != 0 or len(axes) < 2:
        return None
    return keras.layers.Permute([a % len(axes) for a in axes[1:]], **call.settings), call.given


def _reshape(call: _Call) -> Made | None:
    """With the batch left alone."""
    before, (batch, *after) = call.specs[call.given[0].id].shape, call.out.shape
    if before[0] != batch or after.count(None) > 1 or None in before[1:]:
        return None
    return keras.layers.Reshape([-1 if n is None else n for n in after], **call.settings), call.given


def _concatenate(call: _Call) -> Made | None:
    parts = call.given[0]
    axis = call.operation.axis % len(call.out.shape)
    if axis == 0 or not isinstance(parts, list | tuple) or not all(isinstance(x, Ref) for x in parts):
        return None
    if any(call.specs[x.id].dtype != call.out.dtype for x in parts):
        return None
    return keras.layers.Concatenate(axis, **call.settings), (list(parts),)


def _softmax(call: _Call) -> Made | None:
    axis = call.operation.axis
    return (keras.layers.Softmax(axis, **call.settings), call.given) if isinstance(axis, int) else None


def _gelu(call: _Call) -> Made | None:
    return None if call.operation.approximate else (keras.layers.Activation("gelu", **call.settings), call.given)


def _cast(call: _Call) -> Made | None:
    """A rescaling by 1 in the type wanted."""
    return keras.layers.Rescaling(1.0, 0.0, **call.settings), call.given


_MAKERS: Mapping[str, Callable[[_Call], Made | None]] = {
    **dict.fromkeys((*_MERGES, "Divide", "TrueDivide"), _binary),
    **dict.fromkeys(_ACTIVATIONS, _activation),
    "Transpose": _transpose,
    "Reshape": _reshape,
    "ExpandDims": _reshape,
    "Squeeze": _reshape,
    "Concatenate": _concatenate,
    "Softmax": _softmax,
    "Gelu": _gelu,
    "Cast": _cast,
}
