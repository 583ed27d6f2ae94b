"""`aimet_tensorflow.keras.quantsim`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._settings import read_settings, refuse
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet.common.defs import QuantizationDataType, QuantScheme

__all__ = ["QuantScheme", "QuantizationDataType", "QuantizationSimModel"]


class QuantizationSimModel(SimulationModel):
    """Simulates a Keras model quantized; functional, sequential or subclassed.

    Args:
        model: it isn't changed.
        quant_scheme, rounding_mode, default_output_bw, default_param_bw, config_file, default_data_type: as in AIMET.
        in_place: False: `model` of the simulation is a copy.
    """

    def __init__(
        self,
        model: Any,
        quant_scheme: Any = "tf_enhanced",
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
        super().__init__(model, None, settings)


__getattr__ = tell_names(__name__)
