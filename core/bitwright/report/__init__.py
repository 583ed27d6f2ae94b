"""The record of a run: `report.json` for programs, and one self-contained `report.html` for people."""

from __future__ import annotations

from bitwright.report.build import build_report, complete_report, write_report
from bitwright.report.model import Accuracy, Calibration, LayerRow, RunReport, SiteRow, StepRecord

__all__ = [
    "Accuracy",
    "Calibration",
    "LayerRow",
    "RunReport",
    "SiteRow",
    "StepRecord",
    "build_report",
    "complete_report",
    "write_report",
]
