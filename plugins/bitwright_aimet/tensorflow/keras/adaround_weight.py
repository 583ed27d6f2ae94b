"""`aimet_tensorflow.keras.adaround_weight`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet._simulation import param_encodings
from bitwright_aimet._steps import DataSetAdaroundParameters as AdaroundParameters
from bitwright_aimet._steps import adaround_simulation
from bitwright_aimet.tensorflow.keras._models import model_of

__all__ = ["Adaround", "AdaroundParameters"]


class Adaround:
    """Rounds weights up or down by their layers' output error."""

    @staticmethod
    def apply_adaround(
        model: Any,
        params: AdaroundParameters,
        path: str,
        filename_prefix: str,
        default_param_bw: int = 4,
        default_quant_scheme: Any = None,
        config_file: Any = None,
        param_bw_override_list: Any = None,
        ignore_quant_ops_list: Any = None,
    ) -> Any:
        """A new model with rounded weights; their encodings are in `<path>/<filename_prefix>.encodings`."""
        simulation, rounded = adaround_simulation(
            model, None, params, default_param_bw, param_bw_override_list, ignore_quant_ops_list, default_quant_scheme,
            config_file, lambda layer: str(getattr(layer, "name", layer)),
        )  # fmt: skip
        param_encodings(simulation, rounded, path, filename_prefix)
        return model_of(simulation)
