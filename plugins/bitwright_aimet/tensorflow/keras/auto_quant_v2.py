"""`aimet_tensorflow.keras.auto_quant_v2`."""

from __future__ import annotations

from bitwright_aimet._tools import WithMixedPrecision
from bitwright_aimet.tensorflow.keras.auto_quant import AutoQuant

__all__ = ["AutoQuant", "AutoQuantWithAutoMixedPrecision"]


class AutoQuantWithAutoMixedPrecision(WithMixedPrecision, AutoQuant):
    """`AutoQuant` by the name that AIMET 1.31 documents for Keras; `optimize` returns a fourth value, None."""
