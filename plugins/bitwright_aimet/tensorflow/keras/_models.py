"""Keras models of simulations."""

from __future__ import annotations

from typing import Any

from bitwright.simulation import QuantSim


def opened(model: Any) -> QuantSim:
    """A simulation that only serves to change the float model."""
    return QuantSim(model, target="per_tensor")


def model_of(simulation: QuantSim) -> Any:
    """A new `keras.Model` with a simulation's float model."""
    from bitwright_keras import keras_model

    return keras_model(simulation.native)
