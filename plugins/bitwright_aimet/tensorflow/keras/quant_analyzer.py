"""`aimet_tensorflow.keras.quant_analyzer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitwright_aimet._tools import BaseQuantAnalyzer
from bitwright_aimet.common.defs import CallbackFunc

__all__ = ["CallbackFunc", "QuantAnalyzer"]


class QuantAnalyzer(BaseQuantAnalyzer):
    """Finds out which layers cost accuracy.

    Args:
        model: a Keras model.
        forward_pass_callback: runs a model on calibration data.
        eval_callback: a model to its score.
    """

    def __init__(
        self, model: Any, forward_pass_callback: Callable[[Any], Any], eval_callback: Callable[[Any], Any]
    ) -> None:
        super().__init__(model, None, forward_pass_callback, eval_callback)
