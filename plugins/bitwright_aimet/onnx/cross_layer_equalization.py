"""`aimet_onnx.cross_layer_equalization`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet import _steps as steps
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.onnx._models import opened, write


def equalize_model(model: Any) -> None:
    """Fold batch norms, equalize layers and absorb high biases, in the `ModelProto` itself; Clips keep their bounds."""
    simulation = opened(model)
    steps.equalize(simulation)
    write(model, simulation)


__getattr__ = tell_names(__name__)
