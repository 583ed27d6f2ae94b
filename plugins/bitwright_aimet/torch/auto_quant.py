"""`aimet_torch.auto_quant`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitwright_aimet._settings import CONFIG_2, read_settings
from bitwright_aimet._tools import BaseAutoQuant, WithMixedPrecision


class AutoQuant(BaseAutoQuant):
    """Searches for a quantized model that loses no more than is allowed.

    Args:
        model: the module; it isn't changed.
        dummy_input: one batch.
        data_loader: calibration batches.
        eval_callback: a model, and where it takes one a number of samples (None: all), to a score.
        param_bw, output_bw, quant_scheme, rounding_mode, config_file: as of `QuantizationSimModel`; the search tries
            schemes itself, `quant_scheme` is that of `run_inference`.
        results_dir: where the result and a page are written. The same call goes on after an interruption.
        cache_id, strict_validation, model_prepare_required: not needed.
    """

    def __init__(
        self,
        model: Any,
        dummy_input: Any,
        data_loader: Any,
        eval_callback: Callable[..., Any],
        param_bw: int = 8,
        output_bw: int = 8,
        quant_scheme: Any = "tf_enhanced",
        rounding_mode: str = "nearest",
        config_file: Any = None,
        results_dir: str = "results",
        cache_id: str | None = None,
        strict_validation: bool = True,
        model_prepare_required: bool = True,
    ) -> None:
        settings = read_settings(
            quant_scheme, output_bw, param_bw, config_file, rounding_mode=rounding_mode, default_config=CONFIG_2
        )
        super().__init__(model, dummy_input, data_loader, eval_callback, settings, results_dir)


class AutoQuantWithAutoMixedPrecision(WithMixedPrecision, AutoQuant):
    """`AutoQuant` by AIMET's name for it with mixed precision; `optimize` returns a fourth value, None."""
