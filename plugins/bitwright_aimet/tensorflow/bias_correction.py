"""`aimet_tensorflow.bias_correction`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitwright_aimet import _steps as steps
from bitwright_aimet._settings import refuse
from bitwright_aimet.tensorflow._sessions import data_of, network, session_of

__all__ = ["BiasCorrection", "BiasCorrectionParams", "QuantParams"]


@dataclass
class BiasCorrectionParams:
    """What bias correction works on.

    Attributes:
        batch_size: of the data; their batches are taken as they are.
        num_quant_samples, num_bias_correct_samples: one pass serves both; so many samples as the larger of them.
        input_op_names, output_op_names: the network's ends.
    """

    batch_size: int
    num_quant_samples: int
    num_bias_correct_samples: int
    input_op_names: Sequence[str]
    output_op_names: Sequence[str]


class QuantParams(steps.QuantParams):
    """Scheme of bias correction; weights and activations have 8 bits.

    Args:
        quant_mode: of ranges.
        round_mode: "nearest".
        use_cuda: not looked at; TensorFlow places ops.
        ops_to_ignore: not taken: a layer that isn't quantized isn't corrected.
    """

    def __init__(
        self,
        quant_mode: Any = "tf_enhanced",
        round_mode: str = "nearest",
        use_cuda: bool = True,
        ops_to_ignore: Sequence[str] | None = None,
    ) -> None:
        refuse(
            {
                "ops_to_ignore": (
                    list(ops_to_ignore or ()),
                    [],
                    "QuantSim(SessionModel(…), overrides={'layer': 'float'}).apply('bias_correction', data)",
                )
            }
        )
        super().__init__(round_mode=round_mode, quant_scheme=quant_mode)


class BiasCorrection:
    """Corrects the shift of output means that quantization causes."""

    @staticmethod
    def correct_bias(
        reference_model: Any,
        bias_correct_params: BiasCorrectionParams,
        quant_params: QuantParams,
        data_set: Any,
        conv_bn_dict: Any = None,
        perform_only_empirical_bias_corr: bool = True,
    ) -> Any:
        """A new session with corrected biases."""
        given = bias_correct_params
        data = steps.first_samples(data_of(data_set), max(given.num_quant_samples, given.num_bias_correct_samples))
        model = network(reference_model, given.input_op_names, given.output_op_names)
        simulation = steps.corrected(model, None, quant_params, data, None, perform_only_empirical_bias_corr)
        return session_of(simulation)
