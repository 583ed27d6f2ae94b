"""`aimet_tensorflow.keras.auto_quant`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitwright_aimet._settings import read_settings
from bitwright_aimet._tools import BaseAutoQuant


class AutoQuant(BaseAutoQuant):
    """Searches for a quantized model that loses no more than is allowed.

    Args:
        model: a Keras model; it isn't changed.
        eval_callback: a model, and where it takes one a number of samples (None: all), to a score.
        dataset: calibration batches.
        param_bw, output_bw, quant_scheme, rounding_mode, config_file: as of `QuantizationSimModel`.
        results_dir: where the result and a page are written.
        cache_id, strict_validation: not needed.
    """

    def __init__(
        self,
        model: Any,
        eval_callback: Callable[..., Any],
        dataset: Any,
        param_bw: int = 8,
        output_bw: int = 8,
        quant_scheme: Any = "tf_enhanced",
        rounding_mode: str = "nearest",
        config_file: Any = None,
        results_dir: str = "results",
        cache_id: str | None = None,
        strict_validation: bool = True,
    ) -> None:
        settings = read_settings(quant_scheme, output_bw, param_bw, config_file, rounding_mode=rounding_mode)
        super().__init__(model, None, dataset, eval_callback, settings, results_dir)
