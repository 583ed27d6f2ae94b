"""Layers in place of `keras.ops` calls: what an .h5 file can hold, which knows layers only.

The normal form spells preprocessing layers, attention and users' own `keras.ops` calls out as operations. Those that
one of Keras's own layers computes become that layer again, under the operation's name; others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from bitwright_keras.model import KerasModel, Node, Ref, Spec

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


def with_layers(model: KerasModel) -> KerasModel:
    """The model with layers for the operations that have one.

    A division by a constant becomes a product with its reciprocal, which may differ in the last bit; everything else
    computes the same numbers.
    """
    return model.with_(nodes=tuple(_replaced(node, model.specs) for node in model.nodes))


def _replaced(node: Node, specs: Mapping[str, Spec]) -> Node:
    if node.layer is not None or len(node.outputs) != 1:
        return node
    made = _made(node, specs)
    if made is None:
        return node
    layer, args = made
    return replace(node, operation=layer, args=args, kwargs={}, params={})


def _made(node: Node, specs: Mapping[str, Spec]) -> Made | None:
    out = specs[node.outputs[0]]
    if not out.dtype.startswith(("float", "bfloat")):
        return None
    given = (*node.args, *node.kwargs.values())
    settings = {"name": node.operation.name, "dtype": out.dtype}
    if node.type in ("Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Maximum", "Minimum") and len(given) == 2:
        if not all(isinstance(x, Ref) for x in given):
            return _rescaling(node.type, given, out, specs, settings)
        return _merge(node.type, given, out, specs, settings)
    if node.type in _ACTIVATIONS and len(given) == 1:
        return keras.layers.Activation(_ACTIVATIONS[node.type], **settings), given
    maker = _MAKERS.get(node.type)
    return None if maker is None else maker(node.operation, given, out, specs, settings)


def _rescaling(
    kind: str, given: tuple[Any, ...], out: Spec, specs: Mapping[str, Spec], settings: dict[str, Any]
) -> Made | None:
    """x · scale + offset with constants."""
    first = isinstance(given[0], Ref)
    x, constant = given if first else given[::-1]
    if not isinstance(x, Ref) or not isinstance(constant, int | float | np.ndarray | np.generic):
        return None
    if specs[x.id].shape != out.shape:  # the constant widens it
        return None
    value = np.asarray(constant, np.float64)
    factors: dict[tuple[str, bool], tuple[Any, Any]] = {
        ("Add", True): (1.0, value),
        ("Add", False): (1.0, value),
        ("Subtract", True): (1.0, -value),
        ("Subtract", False): (-1.0, value),
        ("Multiply", True): (value, 0.0),
        ("Multiply", False): (value, 0.0),
    }
    if kind in ("Divide", "TrueDivide") and first and (value != 0).all():
        factors[kind, True] = 1 / value, 0.0
    if (kind, first) not in factors:
        return None
    scale, offset = (np.asarray(v, np.float32).tolist() for v in factors[kind, first])
    return keras.layers.Rescaling(scale, offset, **settings), (x,)


def _merge(
    kind: str, given: tuple[Any, ...], out: Spec, specs: Mapping[str, Spec], settings: dict[str, Any]
) -> Made | None:
    """Of two tensors. Of different ranks these layers line up axes otherwise than broadcasting does."""
    shapes = [specs[x.id].shape for x in given]
    alike = all(len(s) == len(out.shape) for s in shapes) and all(specs[x.id].dtype == out.dtype for x in given)
    # What broadcasts along the batch isn't a layer's to combine.
    if kind not in _MERGES or not alike or any(s[0] != out.shape[0] for s in shapes):
        return None
    return _MERGES[kind](**settings), (list(given),)


def _transpose(
    operation: Any, given: tuple[Any, ...], out: Spec, specs: Mapping[str, Spec], settings: dict[str, Any]
) -> Made | None:
    axes = operation.axes
    if axes is None or axes[0] != 0 or len(axes) < 2:
        return None
    return keras.layers.Permute([a % len(axes) for a in axes[1:]], **settings), given


def _reshape(
    operation: Any, given: tuple[Any, ...], out: Spec, specs: Mapping[str, Spec], settings: dict[str, Any]
) -> Made | None:
    """With the batch left alone."""
    before = specs[given[0].id].shape
    if before[0] != out.shape[0] or sum(n is None for n in out.shape[1:]) > 1 or None in before[1:]:
        return None
    return keras.layers.Reshape([-1 if n is None else n for n in out.shape[1:]], **settings), given


def _concatenate(
    operation: Any, given: tuple[Any, ...], out: Spec, specs: Mapping[str, Spec], settings: dict[str, Any]
) -> Made | None:
    parts = given[0]
    axis = operation.axis % len(out.shape)
    if axis == 0 or not isinstance(parts, list | tuple) or not all(isinstance(x, Ref) for x in parts):
        return None
    if any(specs[x.id].dtype != out.dtype for x in parts):
        return None
    return keras.layers.Concatenate(axis, **settings), (list(parts),)


def _softmax(
    operation: Any, given: tuple[Any, ...], out: Spec, specs: Mapping[str, Spec], settings: dict[str, Any]
) -> Made | None:
    return (keras.layers.Softmax(operation.axis, **settings), given) if isinstance(operation.axis, int) else None


def _gelu(
    operation: Any, given: tuple[Any, ...], out: Spec, specs: Mapping[str, Spec], settings: dict[str, Any]
) -> Made | None:
    return None if operation.approximate else (keras.layers.Activation("gelu", **settings), given)


def _cast(
    operation: Any, given: tuple[Any, ...], out: Spec, specs: Mapping[str, Spec], settings: dict[str, Any]
) -> Made | None:
    """A rescaling by 1 in the type wanted."""
    return keras.layers.Rescaling(1.0, 0.0, **settings), given


Maker = Callable[[Any, tuple[Any, ...], Spec, Mapping[str, Spec], dict[str, Any]], Made | None]

_MAKERS: Mapping[str, Maker] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "ExpandDims": _reshape,
    "Squeeze": _reshape,
    "Concatenate": _concatenate,
    "Softmax": _softmax,
    "Gelu": _gelu,
    "Cast": _cast,
}
