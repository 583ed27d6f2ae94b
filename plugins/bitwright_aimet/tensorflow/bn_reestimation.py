"""`aimet_tensorflow.bn_reestimation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitwright_aimet._reestimation import Handle
from bitwright_aimet._reestimation import reestimate_bn_stats as reestimate
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet.tensorflow._sessions import data_of

__all__ = ["Handle", "reestimate_bn_stats"]


def reestimate_bn_stats(
    sim: SimulationModel,
    start_op_names: Sequence[str],
    output_op_names: Sequence[str],
    dataset: Any,
    num_batches: int = 100,
) -> Handle:
    """Measure batch-norm statistics anew in the quantized network; `sim.session` is a new one afterwards.

    Args:
        sim: the simulation.
        start_op_names, output_op_names: not needed: the simulation knows its ends.
        dataset: batches.
        num_batches: how many of them.

    Returns:
        What takes it back.
    """
    return reestimate(sim, data_of(dataset), num_batches)
