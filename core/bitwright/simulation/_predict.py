"""The outputs of a simulated network, or of the float one, over a dataset; and what is odd about them or the data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Session, Simulation, Tap, warn_where_it_began
from bitwright.data import DataLike, ImplausibleDataWarning, Watching, doubts_of_scale, joined
from bitwright.errors import InputError
from bitwright.state import SimState


def predicted(state: SimState, simulation: Simulation[Any] | None, data: DataLike) -> list[NDArray[Any]]:
    """The outputs of the simulation, or of the float model where there is none; see `QuantSim.predict`."""
    taps = [Tap(t) for t in state.graph.outputs]
    session = _floating(state, taps) if simulation is None else simulation.session(taps)
    batches, warned = [], False
    watched = Watching(state.open(data))
    for batch in watched.data if simulation is None else watched:
        # An output that is an input is handed out as it came: no op of the target touches it.
        passed = {tap: np.asarray(batch[tap.tensor]) for tap in taps if tap.tensor in state.graph.inputs}
        found = {**session.run(batch), **passed}
        batches.append(found)
        if simulation is not None and not warned:
            warned = warn_of_infinities(state, simulation, batch, [found[tap] for tap in taps])
    if not batches:
        raise InputError("there are no data to predict on")
    for doubt in doubts_of_scale(watched.seen, _input_ranges(state)):
        warnings.warn(f"predict: {doubt}", ImplausibleDataWarning, stacklevel=3)
    return [joined([b[tap] for b in batches]) for tap in taps]


def warn_of_infinities(
    state: SimState, simulation: Simulation[Any], batch: Batch, outputs: Sequence[NDArray[Any]]
) -> bool:
    """Warn where the simulation's outputs for one batch aren't finite and the float model's are."""
    return warn_where_it_began(state.graph, outputs, batch, simulation.session, lambda taps: _floating(state, taps))


def _floating(state: SimState, taps: Sequence[Tap]) -> Session:
    return state.backend.session(state.native, taps)


def _input_ranges(state: SimState) -> dict[str, tuple[float, float]]:
    """The ends of the grids of the model's inputs, those that have integer grids before run time."""
    held = {t: state.encodings.get(state.plan.root(t)) for t in state.graph.inputs if t in state.plan}
    return {
        t: (float(e.minimum.min()), float(e.maximum.max()))
        for t, e in held.items()
        if e is not None and e.float_format is None and e.is_fixed
    }
