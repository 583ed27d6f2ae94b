"""The record of a run: `report.json` for programs, and one self-contained `report.html` for people."""

from __future__ import annotations

from bitwright.report._build import build_report, complete_report, describe, dumped, finite, write_report
from bitwright.report._model import (
    Accuracy,
    BundleRecord,
    Calibration,
    Cell,
    LayerRow,
    Record,
    ReferenceRecord,
    RunReport,
    SiteRow,
    StepRecord,
    StoredTensor,
)
from bitwright.report._seal import digest, read_report
from bitwright.report._widths import plan_widths
from bitwright.report.charts import HEIGHT, Axis, linear_axis

__all__ = [
    "Accuracy",
    "Axis",
    "BundleRecord",
    "Calibration",
    "Cell",
    "HEIGHT",
    "LayerRow",
    "Record",
    "ReferenceRecord",
    "RunReport",
    "SiteRow",
    "StepRecord",
    "StoredTensor",
    "build_report",
    "complete_report",
    "describe",
    "digest",
    "dumped",
    "finite",
    "linear_axis",
    "plan_widths",
    "read_report",
    "write_report",
]
