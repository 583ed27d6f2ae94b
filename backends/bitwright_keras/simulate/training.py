"""What a user sets on a simulation in training, and loading it from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
from keras import ops

from bitwright.errors import InputError
from bitwright_keras.graph.engine import value_of
from bitwright_keras.simulate.fake_quant import FakeQuantize
from bitwright_keras.simulate.weights import Constant, QuantizedLayer


def set_grid_rate(model: keras.Model, factor: float = 5.0) -> int:
    """Let learned grids train at `factor` times the optimizer's learning rate.

    Learned grids start where calibration left them and must follow the weights as these grow; at the weights' own rate
    they lag behind in short trainings. Keras's optimizers have one rate for all variables, so each grid is
    scale · exp(factor · `log_scale`) with the gradient that it had: the optimizer's step counts `factor` times. Grids
    stay where they are when the factor changes. They should have no weight decay, which would pull them back to where
    they started: `optimizer.exclude_from_weight_decay(var_names=["log_scale", "zero_shift"])`.

    Args:
        model: of `QuantSim.trainable`, one loaded from its file, or a model that holds it. Call it before `fit`; a
            model that has been fitted compiles its steps again.
        factor: above 0; 1 is the weights' rate.

    Returns:
        How many grids are learned; without range learning none is.

    Raises:
        InputError: a factor that isn't above 0.
    """
    if not 0 < factor < float("inf"):
        raise InputError(f"grids learn at a factor above 0 of the learning rate, not {factor}")
    found = 0
    for layer in model._flatten_layers():
        if isinstance(layer, FakeQuantize) and layer.log_scale is not None:
            for variable in (layer.log_scale, layer.zero_shift):
                if variable is not None and layer.grid_rate != factor:
                    variable.assign(ops.convert_to_numpy(value_of(variable)) * (layer.grid_rate / factor))
            layer.grid_rate = float(factor)
            found += 1
    for name in ("train_function", "test_function", "predict_function"):  # they have the old factor in them
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    return found


def load_model(path: str | Path, custom_objects: Any = None, compile: bool = True, safe_mode: bool = True) -> Any:
    """`keras.saving.load_model` for models that hold bitwright's layers: saved trainable simulations.

    Args:
        path, custom_objects, compile, safe_mode: as Keras's.

    Returns:
        The `keras.Model`; it trains on. Its encodings can't be taken back into a `QuantSim`.
    """
    return keras.saving.load_model(
        path, custom_objects={**LAYERS, **(custom_objects or {})}, compile=compile, safe_mode=safe_mode
    )


LAYERS = {f"bitwright>{c.__name__}": c for c in (FakeQuantize, QuantizedLayer, Constant)}
"""The layers of simulations by registered name, as Keras's `custom_objects`."""
