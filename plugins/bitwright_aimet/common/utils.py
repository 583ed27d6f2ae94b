"""AIMET's callback, where its scripts import it from."""

from __future__ import annotations

from bitwright_aimet.common.defs import CallbackFunc

__all__ = ["CallbackFunc"]
