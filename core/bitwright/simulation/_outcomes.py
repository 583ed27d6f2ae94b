"""Taking over what a technique returns: checked first, and nothing changes where anything is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from bitwright.backend import check_encodings
from bitwright.errors import BitwrightError, PluginError
from bitwright.graph import Edit, Graph, SetParams
from bitwright.grids import EncodingTable, Provenance
from bitwright.technique import Outcome, Report

if TYPE_CHECKING:
    from bitwright.simulation._quantsim import QuantSim


@contextmanager
def unchanged_on_failure(sim: QuantSim) -> Iterator[None]:
    """All that a `QuantSim` holds is what it was, the compiled simulation too, if the block raises."""
    before = dict(vars(sim))
    held = {name: type(before[name])(before[name]) for name in ("folded", "overrides", "reports")}
    try:
        yield
    except BaseException:
        vars(sim).clear()
        vars(sim).update(before)
        for name, value in held.items():
            # The very objects stay, for who holds them.
            kept = getattr(sim, name)
            kept.clear()
            kept.extend(value) if isinstance(kept, list) else kept.update(value)
        raise


def take(
    sim: QuantSim, technique: str, settings: Mapping[str, Any], outcome: Outcome, fingerprint: str, seconds: float
) -> None:
    """Take an outcome over.

    Args:
        sim: what the technique was applied to.
        technique: its name.
        settings: JSON-like, for the provenance.
        outcome: what it has returned.
        fingerprint: of the step, for the provenance.
        seconds: what the technique took, for the report.

    Raises:
        PluginError: the outcome isn't one, or its parameters, edits, folded norms or report are invalid.
        EncodingError: an encoding is for no site of the plan, or doesn't fit it.
        ModelError: an edit can't be made.
    """
    with unchanged_on_failure(sim):
        _check_types(technique, outcome)
        edits = list(outcome.edits)
        if edits:
            sim.native = _edited(sim, technique, edits)
        graph = sim.backend.graph(sim.native) if edits else sim.graph
        _check_params(technique, graph, outcome)
        if outcome.params:
            sim.native = _edited(sim, technique, [SetParams(dict(outcome.params))])
        if edits or outcome.params:
            # Ranges that were calibrated on the old weights are stale; frozen ones are the user's or a technique's.
            sim.encodings = EncodingTable(sim.encodings.frozen, sim.encodings.provenance)
        sim.folded.update(outcome.folded)
        sim.refresh()
        check_encodings(sim.graph, sim.plan, outcome.encodings)
        sim.encodings = sim.encodings.merged(outcome.encodings).recorded(Provenance(technique, settings, fingerprint))
        report = outcome.report
        figures = {**report.figures, "seconds": seconds}
        sim.reports.append((technique, Report(report.summary, figures, report.columns, report.rows)))


def _edited(sim: QuantSim, technique: str, edits: Sequence[Edit]) -> Any:
    try:
        return sim.backend.edit(sim.native, edits)
    except BitwrightError:
        raise
    except Exception as error:
        raise PluginError(
            f"technique {technique!r}: the model can't be edited as it asks ({type(error).__name__}: {error}); nothing "
            "was changed"
        ) from error


def _check_types(technique: str, outcome: Any) -> None:
    def wrong(what: str) -> PluginError:
        return PluginError(f"technique {technique!r} has returned {what}; nothing was changed")

    if not isinstance(outcome, Outcome):
        raise wrong(f"a {type(outcome).__name__} where an Outcome belongs")
    for name, kind in (
        ("params", Mapping),
        ("encodings", Mapping),
        ("folded", Mapping),
        ("edits", Sequence),
        ("report", Report),
    ):
        value = getattr(outcome, name)
        if not isinstance(value, kind) or isinstance(value, str):
            raise wrong(f"a {type(value).__name__} as {name}, which is a {kind.__name__}")
    if strange := next((e for e in outcome.edits if not isinstance(e, get_args(Edit))), None):
        raise wrong(f"a {type(strange).__name__} among its edits, which is no edit")
    report = outcome.report
    if not isinstance(report.summary, str):
        raise wrong("a report whose summary is no text")
    if not isinstance(report.figures, Mapping):
        raise wrong("a report whose figures are no mapping")
    for name, figure in report.figures.items():
        if not isinstance(name, str) or not isinstance(figure, int | float | np.number):
            raise wrong(f"a report whose figure {name!r} is no number")
    if not all(isinstance(r, list | tuple) and len(r) == len(report.columns) for r in report.rows):
        raise wrong(f"a report with rows that don't have its {len(report.columns)} columns")


def _check_params(technique: str, graph: Graph, outcome: Outcome) -> None:
    """Parameters and folded norms against the graph after the edits."""
    for id, value in outcome.params.items():
        _check_array(technique, f"parameter {id!r}", value, graph.params[id].shape if id in graph.params else None)
    known = {op.id for op in graph}
    for id, pair in outcome.folded.items():
        fits = isinstance(pair, tuple | list) and len(pair) == 2
        shape = np.shape(pair[0]) if fits else ()
        if id not in known or not fits or len(shape) != 1:
            raise PluginError(
                f"technique {technique!r}: folded norm of {id!r}: a pair of vectors (γ, β) for an op of the model is "
                "needed; nothing was changed"
            )
        for part in pair:
            _check_array(technique, f"folded norm of {id!r}", part, shape)


def _check_array(technique: str, what: str, value: Any, shape: tuple[int, ...] | None) -> None:
    reason = None
    if shape is None:
        reason = "the model has no such parameter"
    elif not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        reason = f"an array of numbers is needed, got a {type(value).__name__}"
    elif value.shape != shape:
        reason = f"shape {value.shape}, the model's is {shape}"
    elif not np.isfinite(value).all():
        reason = "NaN or infinite values"
    if reason is not None:
        raise PluginError(f"technique {technique!r}: {what}: {reason}; nothing was changed")
