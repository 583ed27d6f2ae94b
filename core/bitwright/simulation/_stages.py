"""Techniques that take several passes, each over the network that the one before has left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bitwright.graph import Graph
from bitwright.grids import EncodingTable, Provenance
from bitwright.placement import Plan
from bitwright.simulation._outcomes import unchanged_on_failure
from bitwright.technique import Report, Settings

if TYPE_CHECKING:
    from bitwright.data import Dataset
    from bitwright.simulation._quantsim import QuantSim


@runtime_checkable
class Staged(Protocol):
    """What such a technique has beside those of `Technique`."""

    name: str

    def stages(self, graph: Graph, plan: Plan, settings: Any) -> Sequence[Settings]:
        """The settings of each pass, in order; one for a pass on its own."""


def run(sim: QuantSim, technique: Any, settings: Settings, stages: Sequence[Settings], data: Dataset | None) -> None:
    """Apply each stage; the report and the provenance are those of one technique. Nothing changes if one fails."""
    known, provenance = len(sim.reports), sim.encodings.provenance
    with unchanged_on_failure(sim):
        for stage in stages:
            sim.apply(technique, data, **stage.model_dump())
    done = [report for _, report in sim.reports[known:]]
    figures = {"stages": float(len(done)), "seconds": sum(r.figures.get("seconds", 0.0) for r in done)}
    rows = tuple(row for report in done for row in report.rows)
    summary = f"{len(done)} passes; the last: {done[-1].summary}"
    sim.reports = [*sim.reports[:known], (technique.name, Report(summary, figures, done[-1].columns, rows))]
    last = Provenance(technique.name, settings.model_dump(mode="json"))
    sim.encodings = EncodingTable(dict(sim.encodings), (*provenance, last))
