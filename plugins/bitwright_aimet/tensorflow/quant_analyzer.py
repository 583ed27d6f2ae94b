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
    """

    def __init__(
        self,
        session: Any,
        start_op_names: Sequence[str],
        output_op_names: Sequence[str],
        forward_pass_callback: Callable[[Any], Any],
        eval_callback: Callable[[Any], Any],
    ) -> None:
        model = network(session, start_op_names, output_op_names)
        super().__init__(model, None, forward_pass_callback, lambda simulated: eval_callback(simulated.session))

    def enable_per_layer_mse_loss(self, unlabeled_dataset_iterable: Any, num_batches: int) -> None:
        """Take the layers' errors, which the page has in any case, on these batches."""
        super().enable_per_layer_mse_loss(data_of(unlabeled_dataset_iterable), num_batches)
