"""`aimet_torch.batch_norm_fold`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet import _steps as steps
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet.torch import _in_place as in_place


def fold_all_batch_norms(model: Any, input_shapes: Any = None, dummy_input: Any = None) -> list[tuple[Any, Any]]:
    """Fold batch norms into the layers beside them, in the module itself; they become `Identity`.

    Returns:
        (layer, batch norm) of each.
    """
    sample = in_place.sample_of(input_shapes, dummy_input)
    simulation = in_place.opened(model, sample)
    pairs = [(model.get_submodule(a), model.get_submodule(b)) for a, b in steps.fold(simulation)]
    in_place.write(model, simulation, sample)
    return pairs


def fold_all_batch_norms_to_scale(sim: SimulationModel) -> None:
    """Fold batch norms into the scales of quantized weights, after training; `sim.model` is a new one."""
    sim.changed(lambda simulation: simulation.apply("fold_batch_norm_to_scale"))


__getattr__ = tell_names(__name__)
