"""Phase 1: how much noise each group adds at the network's outputs, alone, at each candidate.

The measure is relative noise power, Σ‖ŷ − y‖² / Σ‖y‖² over all samples (its logarithm is SQNR), averaged over the
outputs: sums over samples, so that it doesn't depend on the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bitwright.backend import Batch, Session, Simulation, Tap
from bitwright.data import Dataset, FirstSamples
from bitwright.errors import InputError
from bitwright.runs import RunDirectory, fingerprint
from bitwright.simulation import QuantSim
from bitwright_search.candidates import Candidate, Group
from bitwright_search.solvers import Table
from bitwright_search.stages import content_of

SAMPLES = 64
"""Samples of the calibration data that sensitivities are measured on by default."""


def first_samples(data: Dataset, count: int, fixed: int | None = None) -> list[Batch]:
    """The first batches, cut to so many samples, however they are batched.

    Args:
        data: what they are taken from.
        count: how many.
        fixed: the batch size that the model fixes, if it does: batches are then taken whole, until there are as many.

    Raises:
        InputError: the data are empty.
    """
    found = list(FirstSamples(data, count, fixed))
    if not found:
        raise InputError("the calibration data are empty: not one batch came; give at least one sample")
    return found


def measure_noise(
    sim: QuantSim,
    groups: Sequence[Group],
    candidates: Sequence[Candidate],
    data: Dataset,
    batches: Sequence[Batch],
    run: RunDirectory,
) -> Table:
    """Relative noise power of each group at each candidate, (groups, candidates); infinite where it isn't allowed.

    Every number is stored as soon as it is known, and not measured again by a later process.
    """
    noises = np.full((len(groups), len(candidates)), np.inf)
    reference = _reference(sim, batches)
    content = content_of(sim)
    seen = fingerprint.of_arrays((f"{i}/{k}", v) for i, b in enumerate(batches) for k, v in sorted(b.items()))
    for c, candidate in enumerate(candidates):
        members = [g for g in groups if c in g.allowed]
        depends = {"network": content, "data": [data.fingerprint(), seen], "candidate": str(candidate),
                   "groups": [[g.name, g.weights, g.activations] for g in members],
                   "schemes": [sim.scheme, sim.weight_scheme]}  # fmt: skip
        store = run.step("mixed precision: sensitivity", depends)
        stored = {g.name: store.get(g.name) for g in members}
        if any(v is None for v in stored.values()):
            sim.progress.start(f"Sensitivity to {candidate}", len(members))
            try:
                for name, noise in _alone(sim, members, candidate, data, batches, reference, stored):
                    store.put(name, {"noise": np.array(noise, np.float64)})
                    sim.progress.advance(1, name)
            finally:
                sim.progress.finish()
        for g, group in enumerate(groups):
            if c in group.allowed and (arrays := store.get(group.name)) is not None:
                noises[g, c] = float(arrays["noise"])
    return noises


def _alone(
    sim: QuantSim,
    groups: Sequence[Group],
    candidate: Candidate,
    data: Dataset,
    batches: Sequence[Batch],
    reference: list[list[np.ndarray[Any, Any]]],
    stored: dict[str, Any],
) -> Iterator[tuple[str, float]]:
    """The noise of each group that isn't known yet, with every other site of the network in float."""
    types = {site: text for g in groups for site, text in g.types(sim, candidate).items()}
    twin = sim.retyped(types).calibrate(data)
    table, plan = twin.table, twin.plan
    simulation: Simulation[Any] = twin.backend.simulate(twin.native, plan, table)
    everything = {plan.root(s) for s in plan.quantized}
    simulation.set(dict.fromkeys(sorted(everything)))
    session = simulation.session([Tap(t) for t in _outputs(sim)])
    for group in groups:
        if stored[group.name] is not None:
            continue
        sites = list(dict.fromkeys(plan.root(s) for s in (*group.weights, *group.activations)))
        simulation.set({s: table[s] for s in sites})
        yield group.name, relative_noise(session, batches, reference)
        simulation.set(dict.fromkeys(sites))


def relative_noise(session: Session, batches: Sequence[Batch], reference: list[list[np.ndarray[Any, Any]]]) -> float:
    """Noise power relative to the signal's, averaged over the outputs."""
    outputs = len(reference[0])
    noise, signal = np.zeros(outputs), np.zeros(outputs)
    for batch, exact in zip(batches, reference, strict=True):
        values = list(session.run(batch).values())
        for o, (y, r) in enumerate(zip(values, exact, strict=True)):
            noise[o] += np.square(np.asarray(y, np.float64) - r).sum()
            signal[o] += np.square(np.asarray(r, np.float64)).sum()
    return float(np.mean(noise / np.maximum(signal, np.finfo(np.float64).tiny)))


def _reference(sim: QuantSim, batches: Sequence[Batch]) -> list[list[np.ndarray[Any, Any]]]:
    session = sim.backend.session(sim.native, [Tap(t) for t in _outputs(sim)])
    return [[np.asarray(v) for v in session.run(batch).values()] for batch in batches]


def _outputs(sim: QuantSim) -> list[str]:
    found = [t for t in sim.graph.outputs if sim.graph.tensors[t].is_float]
    if not found:
        raise InputError("the model has no float output, so there is no signal to compare noise with")
    return found


def decibels(noise: float) -> float | None:
    """SQNR in dB; None where there is no noise."""
    return None if noise <= 0 else -10 * math.log10(noise)
