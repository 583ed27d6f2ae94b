"""Verification: does the simulation predict what the integer runtime computes?"""

from __future__ import annotations

from bitwright.verify._result import Verification
from bitwright.verify._validation import Validation, validate
from bitwright.verify._verify import sqnr, verify

__all__ = ["Validation", "Verification", "sqnr", "validate", "verify"]
