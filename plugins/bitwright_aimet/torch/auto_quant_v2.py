"""`aimet_torch.auto_quant_v2`."""

from __future__ import annotations

from bitwright_aimet.torch.auto_quant import AutoQuant, AutoQuantWithAutoMixedPrecision

__all__ = ["AutoQuant", "AutoQuantWithAutoMixedPrecision"]
