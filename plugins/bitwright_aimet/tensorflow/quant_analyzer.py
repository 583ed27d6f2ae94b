"""`aimet_tensorflow.quant_analyzer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bitwright_aimet._tools import BaseQuantAnalyzer
from bitwright_aimet.common.defs import CallbackFunc
from bitwright_aimet.tensorflow._sessions import data_of, network

__all__ = ["CallbackFunc", "QuantAnalyzer"]


class QuantAnalyzer(BaseQuantAnalyzer):
    """Finds out which layers cost accuracy; callbacks get sessions.

    Args:
        session: with the network.
        start_op_names, output_op_names: its ends.
        forward_pass_callback: runs a session on calibration data.
        eval_callback: a session to its score.
        use_cuda: TensorFlow chooses its devices.
    """

    def __init__(
        self,
        session: Any,
        start_op_names: Sequence[str],
        output_op_names: Sequence[str],
        forward_pass_callback: Callable[[Any], Any],
        eval_callback: Callable[[Any], Any],
        use_cuda: bool = True,
    ) -> None:
        model = network(session, start_op_names, output_op_names)
        super().__init__(model, None, forward_pass_callback, lambda simulated: eval_callback(simulated.session))

    def enable_per_layer_mse_loss(self, unlabeled_dataset_iterable: Any, num_batches: int) -> None:
        """Take the layers' errors, which the page has in any case, on these batches."""
        self.measure_layers_on(data_of(unlabeled_dataset_iterable), num_batches)

    def analyze(
        self,
        quant_scheme: Any = "tf_enhanced",
        rounding_mode: str = "nearest",
        default_param_bw: int = 8,
        default_output_bw: int = 8,
        config_file: Any = None,
        unlabeled_dataset: Any = None,
        num_batches: int | None = None,
        results_dir: str = "./tmp/",
    ) -> Any:
        """Write `analysis.html` and `analysis.json` to a folder.

        Args:
            quant_scheme, rounding_mode, default_param_bw, default_output_bw, config_file: as of `QuantizationSimModel`.
            unlabeled_dataset, num_batches: batches that layers are measured on; without them those of the callback.
            results_dir: the folder.

        Returns:
            The `Analysis`; AIMET returns nothing.
        """
        if unlabeled_dataset is not None:
            self.enable_per_layer_mse_loss(unlabeled_dataset, 4 if num_batches is None else num_batches)
        return self.analyzed(quant_scheme, default_param_bw, default_output_bw, config_file, results_dir, rounding_mode)
