"""Targets: what a piece of hardware or a runtime quantizes, and how."""

from __future__ import annotations

from bitwright.targets._schema import Constraints, Kernel, NumberType
from bitwright.targets._target import Target, is_preset, load_target, target_names, target_summary

__all__ = [
    "Constraints",
    "Kernel",
    "NumberType",
    "Target",
    "is_preset",
    "load_target",
    "target_names",
    "target_summary",
]
