"""`aimet_tensorflow.keras.auto_quant_v2`."""

from __future__ import annotations

from bitwright_aimet.tensorflow.keras.auto_quant import AutoQuant

__all__ = ["AutoQuant"]
