"""`aimet_torch.v2.quantsim.quantsim`."""

from __future__ import annotations

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.torch.quantsim import QuantizationSimModel, load_encodings_to_sim

__all__ = ["QuantizationSimModel", "load_encodings_to_sim"]

__getattr__ = tell_names(__name__)
