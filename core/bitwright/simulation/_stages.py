"""Techniques that take several passes, each over the network that the one before has left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from bitwright.graph import Graph
from bitwright.grids import EncodingTable, Provenance
from bitwright.placement import Plan
from bitwright.state import SimState
from bitwright.technique import Report, Settings


@runtime_checkable
class Staged(Protocol):
    """What such a technique has beside those of `Technique`."""

    name: str

    def stages(self, graph: Graph, plan: Plan, settings: object) -> Sequence[Settings]:
        """The settings of each pass, in order; one for a pass on its own."""


def run(
    state: SimState,
    name: str,
    settings: Settings,
    stages: Sequence[Settings],
    one: Callable[[SimState, Settings], SimState],
) -> SimState:
    """Apply each stage by `one`; the report and the provenance are those of one technique.

    Args:
        state: stays as it is.
        name: of the technique.
        settings: of the technique as a whole, for the provenance.
        stages: the settings of each pass, in order.
        one: makes one pass.
    """
    now = state
    for stage in stages:
        now = one(now, stage)
    done = [report for _, report in now.reports[len(state.reports) :]]
    figures = {"stages": float(len(done)), "seconds": sum(r.figures.get("seconds", 0.0) for r in done)}
    rows = tuple(row for report in done for row in report.rows)
    summary = f"{len(done)} passes; the last: {done[-1].summary}"
    whole = (name, Report(summary, figures, done[-1].columns, rows))
    provenance = (*state.encodings.provenance, Provenance(name, settings.model_dump(mode="json")))
    return replace(now, reports=(*state.reports, whole), encodings=EncodingTable(now.encodings, provenance))
