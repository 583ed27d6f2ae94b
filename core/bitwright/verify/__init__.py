"""Verification: does the simulation predict what the integer runtime computes?"""

from __future__ import annotations

from bitwright.verify._validation import Validation, validate
from bitwright.verify._verify import Verification, sqnr, verify

__all__ = ["Validation", "Verification", "sqnr", "validate", "verify"]
