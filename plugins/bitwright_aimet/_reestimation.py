"""Batch-norm statistics measured anew, and taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitwright.simulation import QuantSim
from bitwright_aimet._simulation import SimulationModel, simulation_of
from bitwright_aimet._steps import batches


class Handle:
    """Takes a change of a simulation back."""

    def __init__(self, simulation: SimulationModel, before: QuantSim) -> None:
        self._simulation, self._before = simulation, before

    def remove(self) -> None:
        """Set the simulation back to what it was."""
        self._simulation.bitwright = self._before
        self._simulation.changed(lambda quantsim: None)


def reestimate_bn_stats(
    model: Any,
    dataloader: Any,
    num_batches: int = 100,
    forward_fn: Callable[[Any, Any], Any] | None = None,
) -> Handle:
    """Measure batch-norm statistics anew in the quantized network.

    Args:
        model: `sim.model`, or the QuantizationSimModel; `sim.model` is a new one afterwards.
        dataloader: batches, or (batch, labels).
        num_batches: how many of them.
        forward_fn: runs the model on a batch.

    Returns:
        What takes it back.
    """
    simulation = simulation_of(model)
    before = simulation.settle().fork()
    data = batches(dataloader, num_batches, forward_fn)
    simulation.changed(lambda quantsim: quantsim.apply("batch_norm_reestimation", data))
    return Handle(simulation, before)
