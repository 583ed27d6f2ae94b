"""Phase 1: how much noise each group adds at the network's outputs, alone, at each candidate.

The measure is relative noise power, Σ‖ŷ − y‖² / Σ‖y‖² over all samples (its logarithm is SQNR), averaged over the
outputs: sums over samples, so that it doesn't depend on the batch size.
"""

from __future__ import annotations

import functools
import math
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.backend import Batch, Session, Simulation, Tap
from bitwright.data import Dataset, FirstSamples
from bitwright.errors import BitwrightError, InputError
from bitwright.grids import EncodingTable
from bitwright.placement import SiteId
from bitwright.runs import RunDirectory, fingerprint
from bitwright.simulation import QuantSim
from bitwright_search.candidates import Candidate, Group
from bitwright_search.solvers import Table
from bitwright_search.stages import content_of

SAMPLES = 64
"""Samples of the calibration data that sensitivities are measured on by default."""
NETWORK = "network"
"""Folder of a step's store that a network lies in while workers measure it."""
SAMPLES_FILE = "samples.npz"
Outputs = list[list[np.ndarray[Any, Any]]]
"""By batch and output."""


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
    reference = outputs_of(sim, batches)
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
                folder = store.path / NETWORK
                for name, noise in _alone(sim, members, candidate, data, batches, reference, stored, folder):
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
    reference: Outputs,
    stored: dict[str, Any],
    folder: Path,
) -> Iterator[tuple[str, float]]:
    """The noise of each group that isn't known yet, with every other site of the network in float."""
    types = {site: text for g in groups for site, text in g.types(sim, candidate).items()}
    twin = sim.retyped(types).calibrate(data)
    roots = {g.name: list(dict.fromkeys(twin.plan.root(s) for s in (*g.weights, *g.activations))) for g in groups
             if stored[g.name] is None}  # fmt: skip
    yield from noises_alone(twin, roots, batches, reference, folder)


def noises_alone(
    sim: QuantSim, roots: Mapping[str, Sequence[SiteId]], batches: Sequence[Batch], reference: Outputs, folder: Path
) -> Iterator[tuple[str, float]]:
    """(name, noise) of each group of sites, with every other site in float; by the workers, if there are some.

    Args:
        sim: a calibrated network.
        roots: the sites of each group, by name.
        batches: the samples.
        reference: the float network's outputs for them.
        folder: where the network may lie while workers measure it.
    """
    try:
        if sim.workers is not None and _laid_out(sim, batches, reference, folder):
            with sim.workers.flight() as flight:
                for name, sites in roots.items():
                    flight.submit(name, noise_of, str(folder), sites)
                while len(flight):
                    name, future = flight.next()
                    yield name, future.result()
            return
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    network = Silenced.of(sim, batches, reference)
    for name, sites in roots.items():
        yield name, network.noise(sites)


@dataclass(frozen=True)
class Silenced:
    """A calibrated network with every site in float, and what its float outputs are on some batches."""

    table: EncodingTable
    simulation: Simulation[Any]
    session: Session
    batches: Sequence[Batch]
    reference: Outputs

    @classmethod
    def of(cls, sim: QuantSim, batches: Sequence[Batch], reference: Outputs) -> Silenced:
        """Of a calibrated simulation."""
        simulation: Simulation[Any] = sim.backend.simulate(sim.native, sim.plan, sim.table)
        simulation.set(dict.fromkeys(sorted({sim.plan.root(s) for s in sim.plan.quantized})))
        return cls(sim.table, simulation, simulation.session([Tap(t) for t in _outputs(sim)]), batches, reference)

    def noise(self, sites: Sequence[SiteId]) -> float:
        """`relative_noise` with these sites alone quantized."""
        self.simulation.set({s: self.table[s] for s in sites})
        found = relative_noise(self.session, self.batches, self.reference)
        self.simulation.set(dict.fromkeys(sites))
        return found


def _laid_out(sim: QuantSim, batches: Sequence[Batch], reference: Outputs, folder: Path) -> bool:
    """Put a network and the samples where workers find them; whether it can be saved."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        sim.save(folder)
    except BitwrightError:
        return False
    arrays = {f"batch/{i}/{name}": np.asarray(v) for i, batch in enumerate(batches) for name, v in batch.items()}
    arrays |= {f"exact/{i}/{o}": v for i, outputs in enumerate(reference) for o, v in enumerate(outputs)}
    numbered: dict[str, Any] = {str(i): values for i, values in enumerate(arrays.values())}
    with (folder / SAMPLES_FILE).open("wb") as file:
        np.savez(file, allow_pickle=False, names=np.array(list(arrays)), **numbered)
    return True


def noise_of(folder: str, sites: Sequence[SiteId]) -> float:
    """`Silenced.noise` of a network that `_laid_out` has put there: what is sent to workers."""
    # The network is opened once a process, and its threads measure one after another.
    with _ONE_AT_A_TIME:
        return _read(folder).noise(sites)


_ONE_AT_A_TIME = threading.Lock()


@functools.lru_cache(maxsize=1)
def _read(folder: str) -> Silenced:
    with np.load(Path(folder) / SAMPLES_FILE, allow_pickle=False) as file:
        arrays = {str(name): file[str(i)] for i, name in enumerate(file["names"])}
    batches: list[dict[str, Any]] = []
    reference: list[list[np.ndarray[Any, Any]]] = []
    for key, values in arrays.items():
        kind, number, name = key.split("/", 2)
        held: list[Any] = batches if kind == "batch" else reference
        if int(number) == len(held):
            held.append({} if kind == "batch" else [])
        if kind == "batch":
            batches[-1][name] = values
        else:
            reference[-1].append(values)
    return Silenced.of(QuantSim.load(folder), batches, reference)


def relative_noise(session: Session, batches: Sequence[Batch], reference: Outputs) -> float:
    """Noise power relative to the signal's, averaged over the outputs."""
    outputs = len(reference[0])
    noise, signal = np.zeros(outputs), np.zeros(outputs)
    for batch, exact in zip(batches, reference, strict=True):
        values = list(session.run(batch).values())
        for o, (y, r) in enumerate(zip(values, exact, strict=True)):
            noise[o] += np.square(np.asarray(y, np.float64) - r).sum()
            signal[o] += np.square(np.asarray(r, np.float64)).sum()
    return float(np.mean(noise / np.maximum(signal, np.finfo(np.float64).tiny)))


def outputs_of(sim: QuantSim, batches: Sequence[Batch]) -> Outputs:
    """What the float network makes of samples, by batch and output."""
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
