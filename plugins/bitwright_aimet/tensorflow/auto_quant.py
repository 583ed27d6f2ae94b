"""`aimet_tensorflow.auto_quant`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bitwright_aimet._settings import read_settings
from bitwright_aimet._tools import BaseAutoQuant
from bitwright_aimet.tensorflow._sessions import data_of, network


class AutoQuant(BaseAutoQuant):
    """Searches for a quantized network that loses no more than is allowed; `eval_callback` gets a session.

    Args:
        session, starting_op_names, output_op_names: the network.
        dataset: calibration batches.
        eval_callback: a session, and where it takes one a number of samples (None: all), to a score.
        param_bw, output_bw, quant_scheme, rounding_mode, config_file: as of `QuantizationSimModel`.
        results_dir: where the result and a page are written.
        cache_id, strict_validation: not needed.
    """

    def __init__(
        self,
        session: Any,
        starting_op_names: Sequence[str],
        output_op_names: Sequence[str],
        dataset: Any,
        eval_callback: Callable[..., Any],
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
        model = network(session, starting_op_names, output_op_names)
        super().__init__(model, None, data_of(dataset), eval_callback, settings, results_dir)
        evaluate = self._evaluate
        self._evaluate = lambda simulated: evaluate(simulated.session)
