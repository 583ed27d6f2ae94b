"""`aimet_torch`: what takes a module changes it in place where AIMET does, and gives modules back."""

from __future__ import annotations

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.torch import onnx
from bitwright_aimet.torch.quantsim import QuantizationSimModel

__all__ = ["QuantizationSimModel", "onnx"]

__getattr__ = tell_names(__name__)
