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
