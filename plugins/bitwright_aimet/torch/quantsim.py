"""`aimet_torch.quantsim`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet._settings import read_settings, refuse
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet.common.defs import QuantizationDataType, QuantScheme
from bitwright_aimet.torch._in_place import name_in

__all__ = ["QuantScheme", "QuantizationDataType", "QuantizationSimModel", "load_encodings_to_sim"]


class QuantizationSimModel(SimulationModel):
    """Simulates a module quantized; it is captured, so reused layers and functional ops need no preparation.

    Args:
        model: the module; it isn't changed.
        dummy_input: one batch; its size stays free.
        quant_scheme: AIMET's enumeration or text; default min-max, as of AIMET 2 (1.x: "tf_enhanced").
        rounding_mode: "nearest".
        default_output_bw, default_param_bw: widths of activations and parameters.
        in_place: False: `model` of the simulation is a copy.
        config_file: a path, or a target's name (`bitwright targets`); None is AIMET's default configuration.
        default_data_type: integers or floats.
    """

    encoding_version = "1.0.0"

    def __init__(
        self,
        model: Any,
        dummy_input: Any,
        quant_scheme: Any = None,
        rounding_mode: str = "nearest",
        default_output_bw: int = 8,
        default_param_bw: int = 8,
        in_place: bool = False,
        config_file: Any = None,
        default_data_type: Any = QuantizationDataType.int,
    ) -> None:
        refuse({"in_place": (in_place, False, "your model stays as it is; evaluate and train sim.model")})
        settings = read_settings(
            quant_scheme, default_output_bw, default_param_bw, config_file, default_data_type, rounding_mode
        )
        self._user = model
        super().__init__(model, dummy_input, settings)

    def name_of(self, layer: Any) -> str:
        """The name of a module, or of what is a name already."""
        return name_in(self._user, layer)


def load_encodings_to_sim(quant_sim_model: QuantizationSimModel, encoding_path: str) -> None:
    """Take all encodings of a file."""
    quant_sim_model.load_encodings(encoding_path)
