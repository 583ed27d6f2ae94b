"""Reports as files: found, sealed and read back, and the digests of encodings that stand in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import first_line
from bitwright.grids import Encoding
from bitwright.report._model import RunReport
from bitwright.report.parts import MARK
from bitwright.runs import of_arrays

Array = NDArray[Any]


REPORT = "report.json"
PAGE = "report.html"


def digest(encoding: Encoding) -> str:
    """Hash of what an encoding does to numbers: scales, and the codes' ends relative to zero; not how it came about.

    Equal for a signed and an unsigned spelling of one grid, and for the same numbers of any schema.
    """
    grid = encoding.grid
    zero = encoding.zero_point.reshape(-1).astype(np.int64)
    ends = np.stack([grid.qmin - zero, grid.qmax - zero])
    if encoding.float_format in ("float16", "bfloat16"):
        return of_arrays([(encoding.float_format, np.zeros(0))])[:16]  # a cast, whatever scale stands beside it
    if encoding.run_time is not None:
        return of_arrays([(str(encoding.run_time), np.zeros(0))])[:16]
    numbers: list[tuple[str, Array]] = [("scale", encoding.scale.reshape(-1))]
    if encoding.float_format is None:
        numbers.append(("ends", ends))
    return of_arrays([(encoding.float_format or "int", np.zeros(0)), *numbers])[:16]


def seal(content: Mapping[str, Any]) -> str:
    """Hash of a report's content, its own seal left out."""
    rest = {k: v for k, v in content.items() if k != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def report_path(folder: Path, stem: str) -> Path | None:
    """The report of an export: `report.json`, or that of its name where another export has taken the place."""
    own = folder / f"{stem}.{REPORT}"
    shared = folder / REPORT
    if named(shared) == stem or (shared.is_file() and not own.is_file()):
        return shared
    return own if own.is_file() else None


def named(path: Path) -> str | None:
    """Which export a report is of; None where there is none that can be read."""
    try:
        return str(json.loads(path.read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def is_page(path: Path) -> bool:
    """Whether a file is a page that bitwright has written."""
    try:
        return MARK in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class ReadReport:
    """A report as it was found.

    Attributes:
        path: the file.
        report: its content; None where there is no file, it can't be read, or it says that it is another export's.
        damage: what is wrong with it; empty if nothing is.
    """

    path: Path
    report: RunReport | None
    damage: str = ""


def read_report(folder: Path, stem: str) -> ReadReport:
    """The report of an export, and whether it is as it was written. Reports from before seals have none."""
    path = report_path(folder, stem)
    if path is None:
        return ReadReport(folder / REPORT, None)
    try:
        content = json.loads(path.read_text())
        report = RunReport.model_validate(content)
        changed = bool(report.seal) and report.seal != seal(content)
    except (OSError, ValueError, RecursionError) as error:
        return ReadReport(path, None, f"{path.name}: it can't be read ({first_line(error)})")
    damage = f"{path.name}: it was changed after the export (its seal doesn't fit)" if changed else ""
    if report.name != stem:  # of another export, or its name is what was changed
        return ReadReport(path, None, damage)
    if damage:
        return ReadReport(path, report, damage)
    if report.record is not None and not report.seal:
        return ReadReport(path, report, f"{path.name}: its seal is missing")
    return ReadReport(path, report)
