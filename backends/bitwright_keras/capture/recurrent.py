"""Recurrent layers as an ONNX runtime has them: LSTM, GRU, SimpleRNN, in one direction or in both.

Keras's gates: i, f, c, o of an LSTM (ONNX: i, o, f, c); z, r, h of a GRU, as in ONNX. Layers with a mask, a state that
lasts, or activations that ONNX's ops don't have stay loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from bitwright_keras.graph.model import KerasModel, Node, Ref
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


def recurrent_layers(model: KerasModel, tensors: Mapping[str, str]) -> list[Any]:
    """The calls of recurrent layers that ONNX has ops for, as `bitwright_onnx` takes them.

    Args:
        model: in normal form.
        tensors: activation → tensor of the frozen graph.
    """
    found = [made for node in model.nodes if (made := _of(model, node, tensors)) is not None]
    return found


def loops(model: KerasModel) -> int:
    """How many calls of recurrent layers there are, of any kind."""
    layers = [node.layer for node in model.nodes if node.layer is not None]
    return sum(any(isinstance(x, keras.layers.RNN) for x in layer._flatten_layers()) for layer in layers)


def _of(model: KerasModel, node: Node, tensors: Mapping[str, str]) -> Any:
    from bitwright_onnx.graphdef.recurrent import Recurrent

    layer: Any = node.layer
    both = type(layer) is keras.layers.Bidirectional
    layers = [layer.forward_layer, layer.backward_layer] if both else [layer]
    if type(layers[0]) not in _KINDS or any(type(x) is not type(layers[0]) for x in layers):
        return None
    initial = _initial(node)
    plain = all(
        not x.stateful and x.compute_dtype == "float32" and None not in _functions(x)
        and _functions(x) == _functions(layers[0])
        for x in layers
    )  # fmt: skip
    masked = any(v is not None for v in keras.tree.flatten(node.kwargs.get("mask")))
    if not plain or masked or initial is None or (both and (initial or layers[0].go_backwards)):
        return None
    outputs = {t: role for t, role in _outputs(layers[0], node, both).items() if t in tensors}
    if not outputs or any(t not in tensors for t in node.inputs):
        return None
    if both and layer.merge_mode is None:
        return None
    kind, _ = _KINDS[type(layers[0])]
    arrays = [_arrays(x) for x in layers]
    return Recurrent(
        kind, tensors[node.inputs[0]], {tensors[t]: role for t, role in outputs.items()},
        [a[0] for a in arrays], [a[1] for a in arrays], [a[2] for a in arrays],
        _functions(layers[0]), backwards=not both and layers[0].go_backwards,
        merge=layer.merge_mode or "" if both else "", initial=[tensors[t] for t in initial],
        reset_after=bool(getattr(layers[0].cell, "reset_after", False)),
    )  # fmt: skip


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


def _outputs(first: Any, node: Node, both: bool) -> dict[str, str]:
    """Activation → what it is."""
    states = ["state", "cell"] if isinstance(first, keras.layers.LSTM) else ["state"]
    states += [f"{state}_reverse" for state in states] if both else []
    roles = ["sequence" if first.return_sequences else "last", *(states if first.return_state else [])]
    return dict(zip(node.outputs, roles, strict=True))


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
