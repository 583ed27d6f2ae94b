"""An export opened again as a simulation: the model and the grids of its encodings file, whatever made them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.bundle import ENCODINGS_SUFFIX, find_bundle, plan_of, read_encodings
from bitwright.data import DataLike
from bitwright.errors import InputError
from bitwright.progress import Progress
from bitwright.report import RunReport, read_report
from bitwright.simulation import QuantSim
from bitwright.targets import load_target


def exported(directory: str | Path, name: str | None = None, *, progress: Progress | None = None) -> QuantSim:
    """The simulation that an export came from: what has an entry is quantized so.

    A technique that is applied to it, and changes to its types, go by the target, types and exceptions that the
    export's report names; by the default target where there is no report.

    Args:
        directory: what `QuantSim.export` or ``bitwright quantize`` wrote.
        name: stem of the files, if it holds several exports.
        progress: where progress is shown.

    Raises:
        InputError: the directory holds no bundle.
        EncodingError: the encodings don't fit the model.
    """
    bundle = find_bundle(Path(directory), name)
    stem = bundle.files["encodings"].name.removesuffix(ENCODINGS_SUFFIX)
    sim = _opened(bundle.files["model"], read_report(Path(directory), stem).report, progress)
    encodings = read_encodings(bundle.files["encodings"], sim.graph)
    plan = plan_of(sim.graph, encodings)
    return QuantSim.of(replace(sim.state, plan=plan, encodings=encodings.restricted(set(plan))))


def samples_of(directory: str | Path, data: DataLike, name: str | None = None) -> DataLike:
    """Data for `exported`: a folder of images is read as the calibration's images were, where that is known.

    Args:
        directory, name: of the export.
        data: as it was given.

    Raises:
        InputError: the directory holds no bundle.
    """
    stem = find_bundle(Path(directory), name).files["encodings"].name.removesuffix(ENCODINGS_SUFFIX)
    report = read_report(Path(directory), stem).report
    return data if report is None else report.read_alike(data)


def _opened(model: Path, report: RunReport | None, progress: Progress | None) -> QuantSim:
    if report is None:
        return QuantSim(model, progress=progress)
    known: dict[str, Any] = {
        "target": load_target(report.target_config, runtime_needed=False),
        "weights": report.weights, "activations": report.activations,
        "progress": progress,
    }  # fmt: skip
    try:
        return QuantSim(model, overrides=report.overrides, **known)
    except InputError:  # exceptions for what folding has taken out of the exported model
        sim = QuantSim(model, **known)
    for what, type in report.overrides.items():
        with suppress(InputError):
            sim = sim.fork(overrides={what: type})
    return sim
