"""`aimet_torch.v2.quantsim.config_utils`."""

from __future__ import annotations

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.torch.quantsim import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)

__all__ = ["set_blockwise_quantization_for_weights", "set_grouped_blockwise_quantization_for_weights"]

__getattr__ = tell_names(__name__)
