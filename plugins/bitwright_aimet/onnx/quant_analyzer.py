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


__getattr__ = tell_names(__name__)
