"""AIMET's callback, where its scripts import it from."""

from __future__ import annotations

from bitwright_aimet._elsewhere import tell_names
from bitwright_aimet.common.defs import CallbackFunc

__all__ = ["CallbackFunc"]

__getattr__ = tell_names(__name__)
