"""Writes what `auto_quantize` found: the bundle, the run's report, and the diagnosis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright.data import Dataset
from bitwright.durable import make_directory, write_text
from bitwright.report import Calibration, build_report, write_report
from bitwright_search.auto_page import render
from bitwright_search.auto_result import AutoQuantResult


def write(result: AutoQuantResult, out: Path, name: str, model: Any, data: Dataset, version: str) -> None:
    """Export the best network to a folder and note its files in the result.

    Raises:
        InputError: the folder can't be written.
    """
    make_directory(out)
    sim = result.sim
    result.bundle = sim.export(out, name=name, encodings_version=version)
    files = dict(result.bundle.files)
    source = Path(model).name if isinstance(model, str | Path) else type(model).__name__
    report = build_report(
        sim,
        name=name,
        source=source,
        calibration=Calibration(
            source=type(data).__name__, samples=data.samples, batch_size=getattr(data, "batch_size", 0),
            scheme=sim.scheme, fingerprint=data.fingerprint(),
        ),
        seconds={"auto_quantize": result.seconds},
        files={purpose: path.name for purpose, path in files.items()},
    )  # fmt: skip
    files["report"], files["page"] = write_report(report, out)
    result.files = {**files, "diagnosis": out / "diagnosis.json", "diagnosis page": out / "diagnosis.html"}
    write_text(out / "diagnosis.json", result.to_json())
    write_text(out / "diagnosis.html", render(result, f"{name} on {result.target}"))
