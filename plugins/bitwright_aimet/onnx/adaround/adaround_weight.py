"""`aimet_onnx.adaround.adaround_weight`."""

from __future__ import annotations

import copy
from typing import Any

from bitwright_aimet._settings import CONFIG_2
from bitwright_aimet._simulation import SimulationModel, param_encodings
from bitwright_aimet._steps import AdaroundParameters, adaround_simulation
from bitwright_aimet.onnx._models import proto_of, write

__all__ = ["Adaround", "AdaroundParameters", "apply_adaround"]


class Adaround:
    """Rounds weights up or down by their layers' output error."""

    @staticmethod
    def apply_adaround(
        model: Any,
        params: AdaroundParameters,
        path: str,
        filename_prefix: str,
        default_param_bw: int = 4,
        param_bw_override_list: Any = None,
        ignore_quant_ops_list: Any = None,
        default_quant_scheme: Any = None,
        default_config_file: Any = None,
        **others: Any,
    ) -> Any:
        """A new `ModelProto` with rounded weights; encodings are in `<path>/<filename_prefix>.encodings`."""
        simulation, rounded = adaround_simulation(
            proto_of(model), None, params, default_param_bw, param_bw_override_list, ignore_quant_ops_list,
            default_quant_scheme, default_config_file, str, CONFIG_2,
        )  # fmt: skip
        param_encodings(simulation, rounded, path, filename_prefix)
        made = copy.deepcopy(proto_of(model))
        write(made, simulation)
        return made


def apply_adaround(
    sim: SimulationModel, inputs: Any, num_iterations: int | None = None, nodes_to_include: Any = None
) -> None:
    """AIMET 2: round a simulation's weights; they stay at later calibrations.

    Args:
        sim: the simulation.
        inputs: batches.
        num_iterations: None searches the roundings directly; a number takes gradient descent with so many steps.
        nodes_to_include: names of nodes; None takes all.
    """
    params = AdaroundParameters(inputs, num_batches=2**62, default_num_iterations=num_iterations)
    include = tuple(str(getattr(node, "name", node)) for node in nodes_to_include or ())
    sim.changed(lambda simulation: simulation.apply("adaround", params.data, include=include, **params.settings))
