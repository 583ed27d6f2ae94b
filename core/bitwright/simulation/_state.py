"""Making states: from a model, by other settings, and from there to an open simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.backend import Batch, Simulation, check_encodings
from bitwright.calibration import scheme as calibration_scheme
from bitwright.calibration import weight_encoding
from bitwright.errors import EncodingError
from bitwright.graph import ParamRole
from bitwright.grids import Encoding
from bitwright.placement import Plan, SiteId, build_plan, is_lost, sized_overrides, without_subgraphs
from bitwright.progress import Progress, Silent
from bitwright.runs import RunDirectory
from bitwright.simulation import bias_forms
from bitwright.simulation._opening import open_model
from bitwright.state import SimState
from bitwright.targets import Target, load_target


def open_state(
    model: object,
    sample: Batch | None = None,
    *,
    target: str | Path | Mapping[str, Any] | Target = "default",
    weights: str | int | None = None,
    activations: str | int | None = None,
    scheme: str = "sqnr",
    weight_scheme: str = "minmax",
    overrides: Mapping[str, Any] | None = None,
    kv_cache: str | None = None,
    backend: str | None = None,
    seed: int = 0,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
) -> SimState:
    """The state of a simulation at its beginning; arguments and errors are those of `QuantSim`."""
    chosen = load_target(target)
    opener, native = open_model(model, sample, backend)
    graph = opener.graph(native)
    return _planned(
        SimState(
            backend=opener,
            native=native,
            graph=graph,
            target=chosen,
            plan=Plan({}, chosen.name),
            weights=weights if weights is None else str(weights),
            activations=activations if activations is None else str(activations),
            scheme=scheme,
            weight_scheme=weight_scheme,
            overrides=dict(overrides or {}),
            kv_cache=kv_cache,
            seed=seed,
            source=Path(model) if isinstance(model, (str, Path)) else None,
            run=run,
            progress=progress or Silent(),
        )
    )


def rebuilt(state: SimState, **changes: Any) -> SimState:
    """A state with other fields, and with what follows from them: its graph and its plan.

    Exceptions for what an edit has removed have nothing left to apply to and go; so do encodings of sites that are
    gone.

    Args:
        state: stays as it is.
        changes: new values of its fields, other than `graph` and `plan`.

    Raises:
        InputError: an override names nothing, or no type.
        ModelError: the model can't be shown as a graph.
    """
    changed = replace(state, **changes)
    if changed.native is not state.native:
        graph = changed.backend.graph(changed.native)
        left = {k: v for k, v in changed.overrides.items() if not is_lost(state.graph, graph, k, v)}
        changed = replace(changed, graph=graph, overrides=left)
    return _planned(changed)


def with_encodings(state: SimState, encodings: Mapping[SiteId, Encoding], *, freeze: bool = False) -> SimState:
    """A state with further encodings, see `QuantSim.set`.

    Raises:
        EncodingError: a site isn't in the plan, takes its encoding from another, or the scales don't fit.
    """
    check_encodings(state.graph, state.plan, encodings)
    given = {s: _held(e.with_(frozen=e.frozen or freeze)) for s, e in encodings.items()}
    return replace(state, encodings=state.encodings.merged(given))


def with_own_numbers(state: SimState) -> SimState:
    """A state in which constants of one number have encodings.

    Files of other frameworks don't name them where these hold the number in the op: x · 0.125 without a parameter. One
    number lies on the end of its grid, so that there is nothing to choose.
    """
    found = {
        site: weight_encoding(state.plan, site, state.params)
        for site in state.plan.parameters
        if site not in state.encodings
        and state.plan[site].role is ParamRole.CONSTANT
        and math.prod(state.graph.params[site].shape) == 1
    }
    return replace(state, encodings=state.encodings.merged(found))


def _held(encoding: Encoding) -> Encoding:
    """An encoding of the user's, with who holds it."""
    if not (encoding.frozen or encoding.kept) or encoding.held_by:
        return encoding
    return encoding.with_(held_by="loaded" if encoding.source == "loaded" else "set by hand")


def _planned(state: SimState) -> SimState:
    for name in (state.scheme, state.weight_scheme):
        calibration_scheme(name)  # refused now, not at the first calibration
    overrides = without_subgraphs(state.graph, state.overrides)
    state = replace(state, overrides=sized_overrides(overrides, state.target))
    plan = build_plan(
        state.graph,
        state.target,
        weights=state.weights,
        activations=state.activations,
        scheme=state.scheme,
        weight_scheme=state.weight_scheme,
        overrides=state.overrides,
        kv_cache=state.kv_cache,
    )
    return replace(state, plan=plan, encodings=state.encodings.restricted(set(plan)))


def require_calibrated(state: SimState) -> None:
    """Refuse to simulate what has no grid yet.

    Raises:
        EncodingError: a site has no encoding.
    """
    missing = [s for s in (*state.plan.activations, *state.plan.parameters) if s not in state.encodings]
    if missing:
        op = state.graph.producer(missing[0]) if missing[0] in state.graph.tensors else None
        first = repr(missing[0]) if op is None else f"{missing[0]!r} ({op.type})"
        told = f"{len(missing)} sites have no encoding yet, {first} first: call calibrate(data)"
        if any(encoding.source == "loaded" for encoding in state.encodings.values()):
            told += ", or load_encodings(file, partial=False), which leaves what the file doesn't name in float"
        raise EncodingError(told)


def open_simulation(state: SimState) -> Simulation[Any]:
    """A new simulation with the encodings in force, and with the derived int32 biases, as the target has them.

    Raises:
        EncodingError: not calibrated yet.
    """
    require_calibrated(state)
    return bias_forms.simulate(state.backend, state.native, state.plan, state.table)
