"""The argument `training` of calls, and which of Keras's layers compute something else with it than in inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

_BY_STATISTICS = (keras.layers.BatchNormalization, keras.layers.SpectralNormalization)
_ALIKE = frozenset({
    "RNN", "SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "SimpleRNNCell", "LSTMCell", "GRUCell",
    "StackedRNNCells", "ConvLSTMCell", "Bidirectional", "TimeDistributed", "MultiHeadAttention",
    "GroupedQueryAttention", "GroupQueryAttention", "Attention", "AdditiveAttention", "Dropout", "SpatialDropout1D",
    "SpatialDropout2D", "SpatialDropout3D", "AlphaDropout", "GaussianDropout", "GaussianNoise", "Dense", "EinsumDense",
    "Resizing", "CenterCrop", "Pipeline", "Sequential", "Functional",
})  # fmt: skip
"""Layers that differ by their dropout and noise only, if at all, or by what is inside of them."""


def differs_in_training(layer: keras.layers.Layer) -> bool:
    """Whether one of Keras's own layers may give other values with training=True."""
    for x in layer._flatten_layers():
        if "training" not in x._call_signature.parameters:
            continue
        if isinstance(x, _BY_STATISTICS) or type(x).__name__ not in _ALIKE:
            return True
        if any(getattr(x, name, 0) for name in ("rate", "dropout", "recurrent_dropout", "stddev")):
            return True
    return False


def takes_training(operation: keras.Operation) -> bool:
    """Whether it is a layer whose `call` has an argument `training`."""
    return isinstance(operation, keras.layers.Layer) and "training" in operation._call_signature.parameters


def default_mode(layer: keras.layers.Layer) -> bool:
    """What a layer that is called by itself takes `training` for; Keras's layers for augmentation take True."""
    default = layer._call_signature.parameters["training"].default
    return default is True or default == 1


def mode_of(operation: keras.Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> bool:
    """The `training` of a recorded call: the one that it was given, otherwise that of the call around it."""
    if not takes_training(operation):
        return training
    given = operation._call_signature.bind_partial(*args, **kwargs).arguments.get("training")
    return training if given is None else bool(given)


def without_training(
    layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments but for `training`."""
    kwargs = {key: x for key, x in kwargs.items() if key != "training"}
    names = [p.name for p in layer._call_signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    place = names.index("training") if "training" in names else len(args)
    kwargs |= dict(zip(names[place + 1 :], args[place + 1 :], strict=False))
    return args[:place], kwargs
