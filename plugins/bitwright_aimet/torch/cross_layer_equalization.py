"""`aimet_torch.cross_layer_equalization`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet import _steps as steps
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.torch import _in_place as in_place


def equalize_model(model: Any, input_shapes: Any = None, dummy_input: Any = None) -> None:
    """Fold batch norms, equalize layers and absorb high biases, in the module itself.

    A bounded ReLU keeps its bound, and the float function with it; AIMET 1 replaces it by ReLU.
    """
    sample = in_place.sample_of(input_shapes, dummy_input)
    simulation = in_place.opened(model, sample)
    steps.equalize(simulation)
    in_place.write(model, simulation, sample)


__getattr__ = tell_names(__name__)
