"""Writes the record of an export beside its files: what was simulated, and what the gate found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from bitwright.backend import Tap
from bitwright.bundle._export_gate import Simulated, run_simulated
from bitwright.bundle._parts import handed_to_parts
from bitwright.bundle._record import ARRAYS_SUFFIX, BUDGET, hashes, stored, write_arrays
from bitwright.data import Samples
from bitwright.errors import BitwrightError
from bitwright.files import Array
from bitwright.graph import TensorId
from bitwright.grids import Encoding
from bitwright.report import BundleRecord, ReferenceRecord, RunReport, build_report, write_report
from bitwright.runs import of_arrays
from bitwright.state import SimState


def write_with(
    state: SimState,
    folder: Path,
    name: str,
    files: Mapping[str, Path],
    names: Mapping[str, str],
    run: Simulated | str,
    *,
    missing: Mapping[str, str],
    compared: int,
    not_compared: Mapping[TensorId, str],
    stored_anew: Sequence[str] = (),
) -> RunReport:
    """Write an export's reference samples and report beside its other files.

    Args:
        state: of the simulation that is exported.
        folder: holds all files of the export, and nothing else.
        name: its stem.
        files: them by purpose.
        names: site → name in the files, where they differ.
        run: the native simulation on reference samples; or why there is none.
        missing: formats that couldn't be written, with the reason.
        compared, not_compared: what the gate found.
        stored_anew: weights that are kept in another type.
    """
    reference = None
    if not isinstance(run, str):
        handed = handed_to_parts(state.graph, files)
        reference = _write_reference(state, folder / f"{name}{ARRAYS_SUFFIX}", run, handed)
    record = BundleRecord(
        contents=hashes(sorted(folder.iterdir()), folder),
        parameters={names.get(p, p): of_arrays([("", state.params[p])])[:16] for p in state.graph.params},
        missing=dict(missing),
        reference=reference,
        without_reference=run if isinstance(run, str) else "",
        compared=compared,
        not_compared=dict(not_compared),
        stored_anew=tuple(stored_anew),
    )
    by_purpose = {purpose: path.name for purpose, path in files.items()}
    if reference is not None:
        by_purpose["record"] = reference.file
    source = state.source.name if state.source is not None else f"a {state.backend.name} model"
    report = build_report(state, name=name, source=source, files=by_purpose, record=record, names=names)
    write_report(report, folder)
    return report


def _write_reference(state: SimState, path: Path, run: Simulated, handed: Sequence[TensorId]) -> ReferenceRecord:
    table = state.table
    fewer = run.samples.first(1)
    if _count(fewer) < _count(run.samples) and _exceeds(run.values, table):
        with suppress(BitwrightError):  # one sample may not run apart from the others
            run = run_simulated(state, run.simulation, fewer, run.session)
    fed: dict[TensorId, Array] = {}
    if handed:
        session = run.simulation.session([Tap(t) for t in handed])
        fed = {tap.tensor: np.array(v) for tap, v in session.run(run.samples.inputs).items()}
    return write_arrays(
        path, run.samples.inputs, state.graph.outputs, list(run.values), run.values, table,
        synthetic=run.samples.synthetic, handed=fed,
    )  # fmt: skip


def _exceeds(values: Mapping[TensorId, Array], table: Mapping[str, Encoding]) -> bool:
    """Whether stored tensors take more than `BUDGET`; no value is looked at where a byte for each is too much."""
    least = sum(v.size for v in values.values() if v.dtype != object)
    return least > BUDGET or sum(stored(t, v, table.get(t))[1].nbytes for t, v in values.items()) > BUDGET


def _count(samples: Samples) -> int:
    return sum(v.size for v in samples.inputs.values())
