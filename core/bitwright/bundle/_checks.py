"""What a reopened export must show: that it computes what was recorded, in the simulation and in the written file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, QuantizedNetwork, Simulation, Tap
from bitwright.bundle._agreement import Agreement, agreement
from bitwright.bundle._export_gate import Renamed, compared_tensors, open_quantized, simulation_network
from bitwright.bundle._record import Reference, read_reference
from bitwright.bundle._reopened import Reopened
from bitwright.errors import BitwrightError, InputError
from bitwright.graph import TensorId
from bitwright.placement import SiteId

Array = NDArray[Any]
QDQ = "qdq"


def against_record(opened: Reopened, simulation: Simulation[Any]) -> list[str]:
    """Problems between the recorded samples, the reopened simulation and the written quantized model.

    Also adds to `opened.notes` what couldn't be compared, and says of changed files whether numbers changed with them.
    """
    reference = _reference(opened)
    found: list[str] = []
    if reference is not None:
        found += _against(opened, reference, simulation)
    same = not found and not opened.problems and reference is not None
    changed = [
        f"{file}: was changed after the export, though it still computes the recorded numbers"
        if same
        else f"{file}: was changed after the export"
        for file in opened.changed
    ]
    return [*found, *changed]


def _reference(opened: Reopened) -> Reference | None:
    record = opened.record
    if record is None:
        return None
    for format, reason in record.missing.items():
        opened.notes.append(f"the export has no {format}: {reason}")
    if record.reference is None:
        opened.notes.append(f"the export has no reference samples: {record.without_reference}")
        return None
    if record.reference.file in opened.changed or not (opened.folder / record.reference.file).is_file():
        return None
    try:
        reference = read_reference(opened.folder, record.reference)
    except BitwrightError as error:
        opened.problems.append(str(error))
        return None
    if reference.synthetic:
        opened.notes.append("its reference samples are made up, as it was exported without calibration data")
    if not opened.part:
        return reference
    if missing := [t for t in opened.graph.inputs if t not in reference.handed and t not in reference.inputs]:
        opened.notes.append(f"the export doesn't record what {opened.part!r} is fed as {missing[0]!r}: export it again")
        return None
    fed = {**reference.inputs, **reference.handed}
    return replace(reference, inputs={t: fed[t] for t in opened.graph.inputs})


def recorded_inputs(opened: Reopened) -> dict[TensorId, Array]:
    """What the export's reference samples feed to the model, or to this part of it.

    Raises:
        InputError: it has none.
    """
    reference = _reference(replace(opened, notes=[], problems=[]))
    if reference is None:
        raise InputError(
            f"{opened.folder}: the export has no reference samples that could be run; give data, or export it again"
        )
    return dict(reference.inputs)


def _against(opened: Reopened, reference: Reference, simulation: Simulation[Any]) -> list[str]:
    names = {here: site for site, here in opened.sites.items() if here in opened.graph.tensors}
    names |= {t: t for t in opened.graph.outputs}
    expected = {here: reference.tensors[site] for here, site in names.items() if site in reference.tensors}
    found: list[str] = []
    network = simulation_network(simulation, list(opened.graph.tensors))
    seen = agreement(opened.graph, expected, reference.inputs, network, opened.table, known=opened.graph.tensors)
    found += _lines(seen, "the reopened simulation", "the recorded one")
    _note(opened, seen, "the reopened simulation")
    file = opened.bundle.files.get(QDQ)
    written = None if file is None else open_quantized(file)
    if file is None or written is None:
        return found
    called = quantized_names(opened, written)
    known = {t for t in expected if called.get(t, t) in written.tensors}
    seen = agreement(opened.graph, expected, reference.inputs, Renamed(written, called), opened.table, known=known)
    found += _lines(seen, file.name, "the recorded simulation")
    _note(opened, seen, file.name)
    return found


def against_simulation(opened: Reopened, simulation: Simulation[Any], batch: Batch) -> list[str]:
    """Problems between the reopened simulation and the written quantized model, on samples of the user's own."""
    file = opened.bundle.files.get(QDQ)
    written = None if file is None else open_quantized(file)
    if file is None or written is None:
        return []
    taps = [Tap(t) for t in compared_tensors(opened.graph, opened.plan)]
    expected = {t.tensor: np.array(v) for t, v in simulation.session(taps).run(batch).items()}
    called = quantized_names(opened, written)
    known = {t for t in expected if called.get(t, t) in written.tensors}
    seen = agreement(opened.graph, expected, batch, Renamed(written, called), opened.table, known=known)
    return _lines(seen, file.name, "the simulation")


def quantized_names(opened: Reopened, written: QuantizedNetwork) -> dict[TensorId, str]:
    """Tensor of the reopened graph → what the quantized file calls it: the site's own name, or that of the record."""
    rows: Mapping[SiteId, Any] = {} if opened.report is None else {r.site: r for r in opened.report.sites}
    found: dict[TensorId, str] = {}
    for site, here in opened.sites.items():
        row = rows.get(site)
        candidates = (site, here, "" if row is None else row.name)
        called = next((c for c in candidates if c and c in written.tensors), None)
        if called is not None and here in opened.graph.tensors:
            found[here] = called
    return found


def _lines(seen: Agreement, what: str, beside: str) -> list[str]:
    if seen.refused:
        return [f"{what} can't be run: {seen.refused}"]
    first = seen.first
    if first is None:
        return []
    more = len(seen.departures) - 1
    rest = f"; {more} more tensors depart" if more else ""
    return [f"{what} departs from {beside} at {first}, on equal inputs{rest}"]


def _note(opened: Reopened, seen: Agreement, what: str) -> None:
    left = {t: why for t, why in seen.unreached.items() if "no such tensor" not in why}
    if left:
        first, why = next(iter(left.items()))
        opened.notes.append(f"{len(left)} tensors of {what} couldn't be compared: {first!r}: {why}")
