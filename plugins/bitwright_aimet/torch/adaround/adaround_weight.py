"""`aimet_torch.adaround.adaround_weight`."""

from __future__ import annotations

from functools import partial
from typing import Any

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._settings import CONFIG_2
from bitwright_aimet._simulation import param_encodings
from bitwright_aimet._steps import AdaroundParameters, adaround_simulation
from bitwright_aimet.torch import _in_place as in_place

__all__ = ["Adaround", "AdaroundParameters"]


class Adaround:
    """Rounds weights up or down by their layers' output error."""

    @staticmethod
    def apply_adaround(
        model: Any,
        dummy_input: Any,
        params: AdaroundParameters,
        path: str,
        filename_prefix: str,
        default_param_bw: int = 4,
        param_bw_override_list: Any = None,
        ignore_quant_ops_list: Any = None,
        default_quant_scheme: Any = None,
        default_config_file: Any = None,
    ) -> Any:
        """A copy of the module with rounded weights; their encodings are in `<path>/<filename_prefix>.encodings`.

        Layers are rounded in order, each on the inputs that the rounded ones before it give.
        """
        simulation, rounded = adaround_simulation(
            model, dummy_input, params, default_param_bw, param_bw_override_list, ignore_quant_ops_list,
            default_quant_scheme, default_config_file, partial(in_place.name_in, model), CONFIG_2,
        )  # fmt: skip
        param_encodings(simulation, rounded, path, filename_prefix)
        return in_place.written(model, simulation, dummy_input)


__getattr__ = tell_names(__name__)
