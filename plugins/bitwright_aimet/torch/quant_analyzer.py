"""`aimet_torch.quant_analyzer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitwright_aimet._settings import CONFIG_2, refuse
from bitwright_aimet._tools import BaseQuantAnalyzer
from bitwright_aimet.common.defs import CallbackFunc

__all__ = ["CallbackFunc", "QuantAnalyzer"]


class QuantAnalyzer(BaseQuantAnalyzer):
    """Finds out which layers cost accuracy.

    Args:
        model: the module.
        dummy_input: one batch.
        forward_pass_callback: runs a model on calibration data.
        eval_callback: a model to its score.
        modules_to_ignore: none.
    """

    default_config = CONFIG_2

    def __init__(
        self,
        model: Any,
        dummy_input: Any,
        forward_pass_callback: Callable[[Any], Any],
        eval_callback: Callable[[Any], Any],
        modules_to_ignore: Any = None,
    ) -> None:
        instead = "bitwright.quant_analyzer(QuantSim(model, …, overrides={'layer': 'float'}), data)"
        refuse({"modules_to_ignore": (list(modules_to_ignore or ()), [], instead)})
        super().__init__(model, dummy_input, forward_pass_callback, eval_callback)

    def enable_per_layer_mse_loss(self, unlabeled_dataset_iterable: Any, num_batches: int) -> None:
        """Take the layers' errors, which the page has in any case, on these batches."""
        self.measure_layers_on(unlabeled_dataset_iterable, num_batches)

    def analyze(
        self,
        quant_scheme: Any = "tf_enhanced",
        default_param_bw: int = 8,
        default_output_bw: int = 8,
        config_file: Any = None,
        results_dir: str = "./tmp/",
    ) -> Any:
        """Write `analysis.html` and `analysis.json` to a folder.

        Returns:
            The `Analysis`; AIMET returns nothing.
        """
        return self.analyzed(quant_scheme, default_param_bw, default_output_bw, config_file, results_dir)
