"""Taking over what a technique returns: checked first, and nothing changes where anything is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, check_encodings
from bitwright.errors import BitwrightError, PluginError
from bitwright.graph import Edit, Graph, OpId, ParamId, SetParams
from bitwright.grids import Encoding, EncodingTable, Provenance
from bitwright.placement import SiteId
from bitwright.simulation._state import rebuilt
from bitwright.state import SimState
from bitwright.technique import Outcome, Report


def taken(
    state: SimState, technique: str, settings: Mapping[str, Any], outcome: Outcome, fingerprint: str, seconds: float
) -> SimState:
    """The state after a technique.

    Args:
        state: what the technique was applied to; it stays as it is.
        technique: its name.
        settings: JSON-like, for the provenance.
        outcome: what it has returned.
        fingerprint: of the step, for the provenance.
        seconds: what the technique took, for the report.

    Raises:
        PluginError: the outcome isn't one, or its parameters, edits, folded norms or report are invalid.
        EncodingError: an encoding is for no site of the plan, or doesn't fit it.
        ModelError: an edit can't be made.
        InputError: an override names nothing of the new network, or no type.
    """
    _check_types(technique, outcome)
    # Read once: what is checked is what is taken.
    params, folded, encodings = dict(outcome.params), dict(outcome.folded), dict(outcome.encodings)
    overrides = {**outcome.overrides, **state.overrides}
    edits, native, graph, table = list(outcome.edits), state.native, state.graph, state.encodings
    if edits:
        native = _edited(state.backend, native, technique, edits)
        graph = state.backend.graph(native)
    _check_params(technique, graph, params, folded)
    if params:
        native = _edited(state.backend, native, technique, [SetParams(params)])
    if edits or params:
        # Ranges that were calibrated on the old weights are stale; frozen ones are the user's or a technique's, and
        # kept ones are good as long as nothing that they were found for has changed.
        same = _unchanged(state, native, graph)
        table = EncodingTable({s: e for s, e in table.held.items() if e.frozen or s in same}, table.provenance)
    owned = {op: (_owned(gamma), _owned(beta)) for op, (gamma, beta) in folded.items()}
    changed_by = state.changed_by if native is state.native else (*state.changed_by, technique)
    folded_now = {**state.folded, **owned}
    now = rebuilt(state, native=native, encodings=table, folded=folded_now, overrides=overrides, changed_by=changed_by)
    check_encodings(now.graph, now.plan, encodings)
    report = outcome.report
    figures = {**report.figures, "seconds": seconds}
    told = (technique, Report(report.summary, figures, report.columns, report.rows))
    held = {s: _held(e, state.encodings.get(s), technique) for s, e in encodings.items()}
    recorded = now.encodings.merged(held).recorded(Provenance(technique, settings, fingerprint))
    return replace(now, encodings=recorded, reports=(*state.reports, told))


def _unchanged(state: SimState, native: object, graph: Graph) -> frozenset[SiteId]:
    """Parameters with a kept encoding that have the values that they had."""
    sites = [s for s, e in state.encodings.items() if e.kept and not e.frozen and s in graph.params]
    if not sites:
        return frozenset()
    now = state.backend.read(native, sites)
    return frozenset(s for s in sites if s in state.graph.params and np.array_equal(now[s], state.params[s]))


def _held(encoding: Encoding, before: Encoding | None, technique: str) -> Encoding:
    """A technique's encoding, with who holds it: the technique, unless it returns what it has found there."""
    if not (encoding.frozen or encoding.kept):
        return encoding.with_(held_by="") if encoding.held_by else encoding
    as_before = before is not None and encoding.equals(before)
    if as_before and before is not None and (encoding.frozen, encoding.kept) == (before.frozen, before.kept):
        return encoding.with_(held_by=before.held_by or technique)
    return encoding.with_(held_by=technique, kept=encoding.kept and not encoding.frozen)


def _owned(values: NDArray[Any]) -> NDArray[Any]:
    """A copy that nobody writes to."""
    copy = np.array(values)
    copy.setflags(write=False)
    return copy


def _edited(backend: Backend[Any], model: object, technique: str, edits: Sequence[Edit]) -> object:
    try:
        return backend.edit(model, edits)
    except BitwrightError:
        raise
    except Exception as error:
        raise PluginError(
            f"technique {technique!r}: the model can't be edited as it asks ({type(error).__name__}: {error}); nothing "
            "was changed"
        ) from error


def _check_types(technique: str, outcome: object) -> None:
    def wrong(what: str) -> PluginError:
        return PluginError(f"technique {technique!r} has returned {what}; nothing was changed")

    if not isinstance(outcome, Outcome):
        raise wrong(f"a {type(outcome).__name__} where an Outcome belongs")
    for name, kind in (
        ("params", Mapping),
        ("encodings", Mapping),
        ("folded", Mapping),
        ("overrides", Mapping),
        ("edits", Sequence),
        ("report", Report),
    ):
        value = getattr(outcome, name)
        if not isinstance(value, kind) or isinstance(value, str):
            raise wrong(f"a {type(value).__name__} as {name}, which is a {kind.__name__}")
    if strange := next((e for e in outcome.edits if not isinstance(e, get_args(Edit))), None):
        raise wrong(f"a {type(strange).__name__} among its edits, which is not an edit")
    report = outcome.report
    if not isinstance(report.summary, str):
        raise wrong("a report whose summary is not text")
    if not isinstance(report.figures, Mapping):
        raise wrong("a report whose figures are no mapping")
    for name, figure in report.figures.items():
        if not isinstance(name, str) or not isinstance(figure, int | float | np.number):
            raise wrong(f"a report whose figure {name!r} is not a number")
    if not all(isinstance(r, list | tuple) and len(r) == len(report.columns) for r in report.rows):
        raise wrong(f"a report with rows that don't have its {len(report.columns)} columns")


def _check_params(technique: str, graph: Graph, params: Mapping[ParamId, Any], folded: Mapping[OpId, Any]) -> None:
    """Parameters and folded norms against the graph after the edits."""
    for id, value in params.items():
        _check_array(technique, f"parameter {id!r}", value, graph.params[id].shape if id in graph.params else None)
    known = {op.id for op in graph}
    for id, pair in folded.items():
        fits = isinstance(pair, tuple | list) and len(pair) == 2
        shape = np.shape(pair[0]) if fits else ()
        if id not in known or not fits or len(shape) != 1:
            raise PluginError(
                f"technique {technique!r}: folded norm of {id!r}: a pair of vectors (γ, β) for an op of the model is "
                "needed; nothing was changed"
            )
        for part in pair:
            _check_array(technique, f"folded norm of {id!r}", part, shape)


def _check_array(technique: str, what: str, value: object, shape: tuple[int, ...] | None) -> None:
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
