"""Writes what `mixed_precision` found: the bundle, the run's report, the front as JSON, and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright.data import Dataset
from bitwright.files import make_directory, write_text
from bitwright_search.auto_export import export_network
from bitwright_search.mixed_page import render
from bitwright_search.mixed_result import MixedPrecisionResult


def write(
    result: MixedPrecisionResult,
    out: Path,
    name: str | None,
    model: Any,
    data: Dataset,
    version: str,
    plain_session: bool | None = None,
) -> None:
    """Export the chosen network to a folder and note its files in the result.

    Raises:
        InputError: the folder can't be written.
    """
    make_directory(out)
    seconds = {"mixed_precision": result.seconds}
    stem, result.bundle, files = export_network(
        result.sim, out, name, model, data, version, seconds, plain_session=plain_session
    )
    result.files = {**files, "front": out / "mixed_precision.json", "front page": out / "mixed_precision.html"}
    write_text(out / "mixed_precision.json", result.to_json())
    write_text(out / "mixed_precision.html", render(result, f"{stem} on {result.target}"))
