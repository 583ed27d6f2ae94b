"""`aimet_tensorflow.batch_norm_fold`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitwright.simulation import QuantSim
from bitwright_aimet import _steps as steps
from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet.tensorflow._sessions import network, session_of


def fold_all_batch_norms(
    sess: Any, input_op_names: Sequence[str], output_op_names: Sequence[str]
) -> tuple[Any, list[tuple[str, str]]]:
    """A new session with batch norms folded, and (layer, batch norm) of each, by the names of ops."""
    simulation = QuantSim(network(sess, input_op_names, output_op_names), target="per_tensor")
    folded = steps.fold(simulation)
    return session_of(simulation), folded


def fold_all_batch_norms_to_scale(
    sim: SimulationModel, starting_op_names: Any = None, output_op_names: Any = None
) -> None:
    """Fold batch norms into the scales of quantized weights, after training; `sim.session` is a new one.

    Args:
        sim: the simulation.
        starting_op_names, output_op_names: not needed: the simulation knows its ends.
    """
    sim.changed(lambda simulation: simulation.apply("fold_batch_norm_to_scale"))


__getattr__ = tell_names(__name__)
