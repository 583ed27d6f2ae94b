"""`aimet_onnx.quant_analyzer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet._settings import CONFIG_2
from bitwright_aimet._tools import BaseQuantAnalyzer
from bitwright_aimet.common.defs import CallbackFunc
from bitwright_aimet.onnx._models import proto_of
from bitwright_aimet.onnx.quantsim import SimulatedSession

__all__ = ["CallbackFunc", "QuantAnalyzer"]


class QuantAnalyzer(BaseQuantAnalyzer):
    """Finds out which layers cost accuracy; callbacks get sessions.

    Args:
        model: a `ModelProto`.
        dummy_input: not needed.
        forward_pass_callback: runs a session on calibration data.
        eval_callback: a session to its score.
    """

    default_config = CONFIG_2

    def __init__(
        self,
        model: Any,
        dummy_input: Any,
        forward_pass_callback: Callable[[Any], Any],
        eval_callback: Callable[[Any], Any],
    ) -> None:
        def score(simulated: Any) -> Any:
            return eval_callback(SimulatedSession(simulated))

        super().__init__(proto_of(model), None, forward_pass_callback, score)

    def enable_per_layer_mse_loss(self, unlabeled_dataset_iterable: Any, num_batches: int) -> None:
        """Take the layers' errors, which the page has in any case, on these batches."""
        self.measure_layers_on(unlabeled_dataset_iterable, num_batches)

    def analyze(
        self,
        quant_scheme: Any = "tf_enhanced",
        default_param_bw: int = 8,
        default_activation_bw: int = 8,
        config_file: Any = None,
        results_dir: str = "./tmp/",
    ) -> Any:
        """Write `analysis.html` and `analysis.json` to a folder.

        Returns:
            The `Analysis`; AIMET returns nothing.
        """
        return self.analyzed(quant_scheme, default_param_bw, default_activation_bw, config_file, results_dir)


__getattr__ = tell_names(__name__)
