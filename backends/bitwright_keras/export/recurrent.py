"""Recurrent layers as an ONNX runtime has them: LSTM, GRU, SimpleRNN, in one direction or in both.

Keras's gates: i, f, c, o of an LSTM (ONNX: i, o, f, c); z, r, h of a GRU, as in ONNX. Layers with a mask, a state that
lasts, or activations that ONNX's ops don't have are written step by step (see `spelled`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from bitwright.graph import AttributeValue, Call, Constant
from bitwright_keras.graph.model import Node, Ref
from bitwright_keras.graph.params import array_of

_KINDS: Mapping[type, tuple[str, int]] = {
    keras.layers.LSTM: ("LSTM", 4),
    keras.layers.GRU: ("GRU", 3),
    keras.layers.SimpleRNN: ("RNN", 1),
}
_ACTIVATIONS: Mapping[str, tuple[str, float | None, float | None]] = {
    "sigmoid": ("Sigmoid", None, None),
    "tanh": ("Tanh", None, None),
    "relu": ("Relu", None, None),
    "softsign": ("Softsign", None, None),
    "hard_sigmoid": ("HardSigmoid", 1 / 6, 0.5),
}
_GATES = [0, 3, 1, 2]
"""Keras's gate of an LSTM at each place of ONNX's."""


def recurrent_call(node: Node) -> Call | None:
    """The call of a recurrent layer in the words of `bitwright_onnx.emit.recurrent`, with the weights that it has now.

    Returns:
        None for other layers, and for those that ONNX has no op for.
    """
    layer: Any = node.layer
    both = type(layer) is keras.layers.Bidirectional
    layers = [layer.forward_layer, layer.backward_layer] if both else [layer]
    if type(layers[0]) not in _KINDS or any(type(x) is not type(layers[0]) for x in layers):
        return None
    initial, functions = _initial(node), _functions(layers[0])
    plain = all(
        not x.stateful and x.compute_dtype == "float32" and None not in _functions(x) and _functions(x) == functions
        for x in layers
    )  # fmt: skip
    masked = any(v is not None for v in keras.tree.flatten(node.kwargs.get("mask")))
    if not plain or masked or initial is None or (both and (initial or layers[0].go_backwards)):
        return None
    if both and layer.merge_mode is None:
        return None
    arrays = zip(*map(_arrays, layers), strict=True)
    several = functions * len(layers)
    attributes: dict[str, AttributeValue] = {
        "kind": _KINDS[type(layers[0])][0], "results": _results(layers[0], both),
        "activations": tuple(name for name, _, _ in several),
        "activation_alpha": tuple(a for _, a, _ in several if a is not None),
        "activation_beta": tuple(b for _, _, b in several if b is not None),
        "merge": layer.merge_mode if both else "", "backwards": int(not both and layers[0].go_backwards),
        "linear_before_reset": int(bool(getattr(layers[0].cell, "reset_after", False))),
    }  # fmt: skip
    return Call(attributes, {i: Constant(np.stack(a)) for i, a in enumerate(arrays, 1)}, "Recurrent")


def _initial(node: Node) -> list[str] | None:
    """Tensors of the first states; None where a call has other arguments."""
    given = node.kwargs.get("initial_state", node.args[1] if len(node.args) > 1 else None)
    known = {"initial_state", "mask", "training", "sequences"}
    if len(node.args) > 2 or set(node.kwargs) - known or not node.args or not isinstance(node.args[0], Ref):
        return None
    states = [] if given is None else keras.tree.flatten(given)
    return [s.id for s in states] if all(isinstance(s, Ref) for s in states) else None


def _functions(layer: Any) -> list[Any]:
    """Activations in ONNX's order; None for those that it doesn't have."""
    cell = layer.cell

    def named(function: Any) -> Any:
        own = getattr(function, "__module__", "").startswith("keras.")
        return _ACTIVATIONS.get(getattr(function, "__name__", "")) if own else None

    inner = named(cell.activation)
    if isinstance(layer, keras.layers.SimpleRNN):
        return [inner]
    gates = named(cell.recurrent_activation)
    return [gates, inner, inner] if isinstance(layer, keras.layers.LSTM) else [gates, inner]


def _results(first: Any, both: bool) -> tuple[str, ...]:
    """What each output is."""
    states = ["state", "cell"] if isinstance(first, keras.layers.LSTM) else ["state"]
    states += [f"{state}_reverse" for state in states] if both else []
    return ("sequence" if first.return_sequences else "last", *(states if first.return_state else []))


def _arrays(layer: Any) -> tuple[Any, Any, Any]:
    """W, R and B of one direction."""
    cell = layer.cell
    kernel, inner = (array_of(v).astype(np.float32) for v in (cell.kernel, cell.recurrent_kernel))
    kind, gates = _KINDS[type(layer)]
    units = inner.shape[0]
    bias = np.zeros((2, gates * units), np.float32)
    if cell.use_bias:
        own = array_of(cell.bias).astype(np.float32)
        bias[: 2 if own.ndim == 2 else 1] = own

    def ordered(array: Any) -> Any:
        return array if kind != "LSTM" else array.reshape(-1, 4, units)[:, _GATES].reshape(array.shape)

    return ordered(kernel).T.copy(), ordered(inner).T.copy(), ordered(bias).reshape(-1)
