"""`aimet_tensorflow.keras.batch_norm_fold`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet import _steps as steps
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet.tensorflow.keras._models import model_of, opened


def fold_all_batch_norms(model: Any) -> tuple[list[tuple[str, str]], Any]:
    """(Layer, batch norm) of each that was folded, by name, and a new model."""
    simulation = opened(model)
    folded = steps.fold(simulation)
    return folded, model_of(simulation)


def fold_all_batch_norms_to_scale(sim: SimulationModel) -> None:
    """Fold batch norms into the scales of quantized weights, after training; `sim.model` is a new one."""
    sim.changed(lambda simulation: simulation.apply("fold_batch_norm_to_scale"))


__getattr__ = tell_names(__name__)
