"""`aimet_tensorflow.quantsim`, of AIMET up to 1.31."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._settings import read_settings
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet.common.defs import QuantizationDataType, QuantScheme
from bitwright_aimet.tensorflow._sessions import network

__all__ = ["QuantScheme", "QuantizationDataType", "QuantizationSimModel"]


class QuantizationSimModel(SimulationModel):
    """Simulates the network in a session quantized.

    Args:
        session: with initialized variables; it isn't changed.
        starting_op_names, output_op_names: the network's ends.
        quant_scheme, rounding_mode, default_output_bw, default_param_bw, config_file, default_data_type: as in AIMET.
        use_cuda: not looked at; TensorFlow places ops.
    """

    def __init__(
        self,
        session: Any,
        starting_op_names: Sequence[str],
        output_op_names: Sequence[str],
        quant_scheme: Any = "tf_enhanced",
        rounding_mode: str = "nearest",
        default_output_bw: int = 8,
        default_param_bw: int = 8,
        use_cuda: bool = True,
        config_file: Any = None,
        default_data_type: Any = QuantizationDataType.int,
    ) -> None:
        settings = read_settings(
            quant_scheme, default_output_bw, default_param_bw, config_file, default_data_type, rounding_mode
        )
        super().__init__(network(session, starting_op_names, output_op_names), None, settings)

    @property
    def session(self) -> Any:
        """The simulated graph's session, to evaluate and to train; tensors keep their names.

        The network's results after their own quantization are `sim.model.outputs`.
        """
        return self.model.session


__getattr__ = tell_names(__name__)
