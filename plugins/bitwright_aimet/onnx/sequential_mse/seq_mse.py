"""`aimet_onnx.sequential_mse.seq_mse`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet import _steps as steps
from bitwright_aimet._simulation import SimulationModel


def apply_seq_mse(sim: SimulationModel, inputs: Any, num_candidates: int = 20, nodes_to_exclude: Any = None) -> None:
    """Choose weight scales by the layers' output errors; they stay at later calibrations."""
    exclude = tuple(str(getattr(node, "name", node)) for node in nodes_to_exclude or ())
    data = steps.batches(inputs, None)

    def search(simulation: Any) -> None:
        steps.seq_mse(simulation, data, num_candidates, exclude=exclude)

    sim.changed(search)
