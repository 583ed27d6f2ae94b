"""`aimet_tensorflow.keras.model_preparer`."""

from __future__ import annotations

from bitwright_aimet._prepared import NotNeeded, prepare_model

__all__ = ["NotNeeded", "prepare_model"]
