"""Activations: what the formulas compute, and clips by their bounds, the same on every framework."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from bitwright.graph import ACTIVATION_TYPES, ActivationAttrs, Formula, OpKind, clipping, erf, formula

X = np.concatenate([np.linspace(-9, 9, 181), [-40.0, 40.0]])
CALLS = {"Add": np.add, "Mul": np.multiply, "Div": np.divide, "Abs": np.abs, "Erf": erf}
INF = float("inf")
BOUNDS = [
    (0.0, 6.0, OpKind.CLIPPED_RELU, "Clip", ActivationAttrs(0.0, 6.0)),
    (0.0, None, OpKind.RELU, "Relu", ActivationAttrs(0.0, None)),
    (0.0, INF, OpKind.RELU, "Relu", ActivationAttrs(0.0, None)),
    (0.0, float(np.finfo(np.float32).max), OpKind.RELU, "Relu", ActivationAttrs(0.0, None)),
    (-1.0, 1.0, OpKind.ACTIVATION, "Clip", ActivationAttrs(-1.0, 1.0)),
    (-INF, 6.0, OpKind.ACTIVATION, "Clip", ActivationAttrs(None, 6.0)),
    (0.0, 0.0, OpKind.ACTIVATION, "Clip", ActivationAttrs(0.0, 0.0)),
]


def value(what: Formula | float | None) -> np.ndarray:
    if not isinstance(what, Formula):
        return X if what is None else np.array(what)
    operands = [value(o) for o in what.operands]
    return CALLS[what.type](*operands) if what.type in CALLS else ACTIVATION_TYPES[what.type].compute(*operands)


@pytest.mark.parametrize("type", ACTIVATION_TYPES)
def test_formulas_compute_the_activation(type):
    expected = ACTIVATION_TYPES[type].compute(X)
    assert expected.dtype == np.float64
    assert ACTIVATION_TYPES[type].compute(X.astype(np.float32)).dtype == np.float32
    for has in (ACTIVATION_TYPES.keys(), ACTIVATION_TYPES.keys() - {type}, {"HardSigmoid"}, ()):
        np.testing.assert_allclose(value(formula(type, has)), expected, rtol=1e-6, atol=1e-6)
    assert formula(type, {type}) == Formula(type, (None,))


def test_formulas_use_only_what_there_is():
    def types(what):
        return {what.type}.union(*(types(o) for o in what.operands if isinstance(o, Formula)))

    assert types(formula("HardSwish", ())) == {"Mul", "Div", "Add", "Relu6"}
    assert types(formula("HardSwish", {"HardSigmoid"})) == {"Mul", "HardSigmoid"}


@pytest.mark.parametrize(("low", "high", "kind", "type", "attrs"), BOUNDS)
def test_clips_by_their_bounds(low, high, kind, type, attrs):
    assert clipping(low, high) == (kind, type, attrs)


@pytest.mark.parametrize(("low", "high", "kind", "type", "attrs"), [b for b in BOUNDS if b[1] is not None])
@pytest.mark.parametrize("framework", ["torch", "tensorflow", "keras"])
def test_frameworks_clip_by_their_bounds(framework, low, high, kind, type, attrs):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} isn't installed")
    (op,) = CLIPS[framework](low, high)
    assert (op.kind, op.type, op.attrs) == (kind, type, attrs)


def torch_clip(low, high):
    import torch

    from bitwright_torch.backend import TorchBackend

    class Net(torch.nn.Module):
        def forward(self, x):
            return x.clamp(low, high)

    return TorchBackend().graph(TorchBackend().adopt(Net(), (torch.ones(2, 3),)))


def tensorflow_clip(low, high):
    import tensorflow as tf

    from bitwright_tensorflow.backend import TensorFlowBackend

    backend = TensorFlowBackend()
    return backend.graph(
        backend.adopt(tf.function(lambda x: tf.clip_by_value(x, low, high)), np.ones((2, 3), np.float32))
    )


def keras_clip(low, high):
    import keras

    from bitwright_keras.backend import KerasBackend

    x = keras.Input((3,))
    return KerasBackend().graph(KerasBackend().adopt(keras.Model(x, keras.ops.clip(x, low, high))))


CLIPS = {"torch": torch_clip, "tensorflow": tensorflow_clip, "keras": keras_clip}
