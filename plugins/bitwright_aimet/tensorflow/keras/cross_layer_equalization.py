"""`aimet_tensorflow.keras.cross_layer_equalization`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet import _steps as steps
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.tensorflow.keras._models import model_of, opened


def equalize_model(model: Any) -> Any:
    """A new model: batch norms folded, layers equalized, high biases absorbed; bounded ReLUs keep their bounds."""
    simulation = opened(model)
    steps.equalize(simulation)
    return model_of(simulation)


__getattr__ = tell_names(__name__)
