"""The record of a run: `report.json` for programs, and one self-contained `report.html` for people."""

from __future__ import annotations

from bitwright.report._build import build_report, complete_report, describe, dumped, finite, write_report
from bitwright.report._model import (
    Accuracy,
    BundleRecord,
    Calibration,
    Cell,
    LayerRow,
    MetricRecord,
    Record,
    ReferenceRecord,
    RunReport,
    SiteRow,
    StepRecord,
    StoredTensor,
)
from bitwright.report._runs import (
    COLUMNS,
    Difference,
    Listed,
    difference,
    read_run,
    render_difference,
    render_index,
    runs_in,
)
from bitwright.report._seal import PAGE, REPORT, digest, is_page, named, read_report
from bitwright.report._widths import plan_widths
from bitwright.report.charts import HEIGHT, Axis, linear_axis

__all__ = [
    "COLUMNS",
    "HEIGHT",
    "PAGE",
    "REPORT",
    "Accuracy",
    "Axis",
    "BundleRecord",
    "Calibration",
    "Cell",
    "Difference",
    "LayerRow",
    "Listed",
    "MetricRecord",
    "Record",
    "ReferenceRecord",
    "RunReport",
    "SiteRow",
    "StepRecord",
    "StoredTensor",
    "build_report",
    "complete_report",
    "describe",
    "difference",
    "digest",
    "dumped",
    "finite",
    "is_page",
    "linear_axis",
    "named",
    "plan_widths",
    "read_report",
    "read_run",
    "render_difference",
    "render_index",
    "runs_in",
    "write_report",
]
