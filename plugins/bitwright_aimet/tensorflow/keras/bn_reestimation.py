"""`aimet_tensorflow.keras.bn_reestimation`."""

from __future__ import annotations

from typing import Any

from bitwright_aimet import _reestimation
from bitwright_aimet._reestimation import Handle

__all__ = ["Handle", "reestimate_bn_stats"]


def reestimate_bn_stats(model: Any, bn_re_estimation_dataset: Any, bn_num_batches: int = 100) -> Handle:
    """Measure batch-norm statistics anew in the quantized network; `sim.model` is a new one afterwards.

    Args:
        model: `sim.model`, or the QuantizationSimModel.
        bn_re_estimation_dataset: batches.
        bn_num_batches: how many of them.
    """
    return _reestimation.reestimate_bn_stats(model, bn_re_estimation_dataset, bn_num_batches)
