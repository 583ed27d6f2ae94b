"""Where more bits buy most: 16 for activations, 8 for weights; which sites could have them, and what each costs now.

A site's noise is that at the network's outputs with this site alone on its grid. Networks with many sites are measured
by classes of sites that stand at the same place of a repeated block; the classes that cost most are then measured site
by site, and in the others a site has the part of its class that its own rounding error has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Tap
from bitwright.bank import Bank, tensor_noise, weight_noise
from bitwright.data import Dataset
from bitwright.graph import Graph, ParamRole, TensorId
from bitwright.placement import SiteId
from bitwright.progress import Store
from bitwright.simulation import QuantSim
from bitwright_search.candidates import COSTED, runs_kernel
from bitwright_search.sensitivity import SAMPLES, Outputs, first_samples, noises_alone, outputs_of

ACTIVATION_BITS, WEIGHT_BITS = 16, 8
"""What activations and weights may have in the end."""
FORWARDS = 160
"""Measurements at most, each of them a forward pass of the samples."""
OUTPUT_BYTES = 2**27
"""Float outputs of the samples that are held to compare with; fewer samples are taken where they are larger."""
TAPS = 32
"""Tensors of one pass that are handed out together."""


@dataclass(frozen=True)
class Wider:
    """A site that could have more bits.

    Attributes:
        root: the site that has the encoding.
        text: the wider type.
        sites: all that share the grid.
        weight: it is a parameter.
        place: equal for sites at the same place of repeated blocks.
    """

    root: SiteId
    text: str
    sites: tuple[SiteId, ...]
    weight: bool
    place: tuple[Any, ...]

    @property
    def types(self) -> dict[SiteId, str]:
        """The wider type of every site that shares the grid."""
        return dict.fromkeys(self.sites, self.text)


def widenings(sim: QuantSim) -> tuple[Wider, ...]:
    """Every integer grid of a network that has fewer bits than it may have and that the target runs with more."""
    found = []
    for root in (*sim.plan.activations, *sim.plan.parameters):
        weight = root in sim.graph.params
        spec = sim.plan.spec(root)
        assert spec is not None
        bits = WEIGHT_BITS if weight else ACTIVATION_BITS
        if spec.float_format is not None or spec.bits >= bits:
            continue
        text = f"{'int' if spec.signed else 'uint'}{bits}"
        if weight and not any(op.params.get(ParamRole.WEIGHT) == root for op in sim.graph.linear_ops):
            continue
        if _listed(sim, root, text, weight=weight):
            found.append(Wider(root, text, tuple(sim.plan.tied(root)), weight, _place(sim, root)))
    twin = sim.retyped({site: text for w in found for site, text in w.types.items()})
    taken = {w.root: twin.plan.spec(w.root) for w in found if w.root in twin.plan}
    return tuple(
        w for w in found
        if (spec := taken.get(w.root)) is not None and spec.bits == (WEIGHT_BITS if w.weight else ACTIVATION_BITS)
    )  # fmt: skip


def _listed(sim: QuantSim, root: SiteId, text: str, *, weight: bool) -> bool:
    """Whether the target has kernels for the ops that read a site with a wider type."""
    readers = sim.graph.users(root) if weight else [u for t in sim.plan.tied(root) for u in sim.graph.consumers(t)]
    for op in readers:
        if op.kind not in COSTED or not op.data_inputs:
            continue
        inputs = sim.plan.root(op.data_inputs[0])
        activation = text if not weight and inputs == root else None
        if not runs_kernel(sim, op.id, activation=activation, weight=text if weight else None):
            return False
    return True


def _place(sim: QuantSim, root: SiteId) -> tuple[Any, ...]:
    """What the surroundings of a site look like: the ops that make it, that read it, and their neighbours."""
    graph = sim.graph
    if root in graph.params:
        users = graph.users(root)
        return ("weight", graph.params[root].shape, tuple(_around(graph, op.output) for op in users))
    shape = graph.tensors[root].shape
    return ("activation", None if shape is None else shape[1:], _around(graph, root))


def _around(graph: Graph, tensor: TensorId) -> tuple[Any, ...]:
    maker = graph.producer(tensor)
    made_of = () if maker is None else tuple(_made_by(graph, t) for t in maker.data_inputs)
    readers = sorted((op.type, tuple(sorted(u.type for u in graph.consumers(op.output)))) for op in
                     graph.consumers(tensor) if op.outputs)  # fmt: skip
    return ("" if maker is None else maker.type, made_of, tuple(readers))


def _made_by(graph: Graph, tensor: TensorId) -> tuple[str, ...]:
    op = graph.producer(tensor)
    return () if op is None else (op.type, *(p.type for t in op.data_inputs if (p := graph.producer(t)) is not None))


def probes(sim: QuantSim, data: Dataset) -> list[Batch]:
    """The samples that noise is measured on: at most `SAMPLES`, and fewer where their outputs are large."""
    batches = first_samples(data, 1, sim.fixed_batch)
    held = sum(v.nbytes for outputs in outputs_of(sim, batches) for v in outputs)
    count = int(min(SAMPLES, max(1, OUTPUT_BYTES // max(1, held))))
    return batches if count == 1 else first_samples(data, count, sim.fixed_batch)


def measured(
    sim: QuantSim, wider: Sequence[Wider], batches: Sequence[Batch], store: Store, folder: Path
) -> dict[SiteId, float]:
    """Relative noise power at the outputs of each site alone; stored as soon as it is known.

    Args:
        sim: a calibrated network.
        wider: which sites.
        batches: the samples.
        store: where measurements are kept.
        folder: where the network may lie while workers measure it.
    """
    places: dict[tuple[Any, ...], list[Wider]] = {}
    for w in wider:
        places.setdefault(w.place, []).append(w)
    singly = len(wider) <= FORWARDS
    groups = {members[0].root: members for members in places.values()}
    network = _Network(sim, batches, store, folder)
    if singly:
        return network.noises({w.root: [w.root] for w in wider})
    whole = network.noises({f"{name} and its like": [w.root for w in members] for name, members in groups.items()})
    left = FORWARDS - len(groups)
    found: dict[SiteId, float] = {}
    for name, members in sorted(groups.items(), key=lambda item: -whole[f"{item[0]} and its like"]):
        noise = whole[f"{name} and its like"]
        if len(members) == 1:
            found[name] = noise
        elif len(members) <= left:
            left -= len(members)
            found |= network.noises({w.root: [w.root] for w in members})
        else:
            found |= network.shared_out(noise, [w.root for w in members])
    return found


def predicted(sim: QuantSim, wider: Sequence[Wider], bank: Bank) -> dict[SiteId, float]:
    """Noise of each site where it arises, in closed form from a bank: nothing runs.

    Raises:
        InputError: the bank is of another network, or lacks a layer or a tensor.
    """
    users = {op.weight: op for op in reversed(sim.graph.linear_ops)}
    found = {}
    for w in wider:
        grid = sim.table[w.root]
        if w.weight:
            found[w.root] = weight_noise(bank, users[w.root], sim.params[w.root], grid)
        else:
            found[w.root] = max(tensor_noise(bank, t, grid) for t in sim.plan.observed(w.root))
    return found


class _Network:
    """A network's sites, measured once each."""

    def __init__(self, sim: QuantSim, batches: Sequence[Batch], store: Store, folder: Path) -> None:
        self.sim, self.batches, self.store, self.folder = sim, batches, store, folder
        self._reference: Outputs | None = None

    def noises(self, wanted: Mapping[str, Sequence[SiteId]]) -> dict[str, float]:
        """Noise at the outputs of each group of sites alone."""
        found = {name: a for name in wanted if (a := self.store.get(name)) is not None}
        left = {name: list(sites) for name, sites in wanted.items() if name not in found}
        if left:
            if self._reference is None:
                self._reference = outputs_of(self.sim, self.batches)
            self.sim.progress.start("Noise of single sites", len(left))
            try:
                for name, noise in noises_alone(self.sim, left, self.batches, self._reference, self.folder):
                    found[name] = {"noise": np.array(noise, np.float64)}
                    self.store.put(name, found[name])
                    self.sim.progress.advance(1, name)
            finally:
                self.sim.progress.finish()
        return {name: float(found[name]["noise"]) for name in wanted}

    def shared_out(self, noise: float, sites: Sequence[SiteId]) -> dict[SiteId, float]:
        """The noise of a class, shared out by its sites' own rounding errors."""
        own = dict(self._rounding(sites))
        total = sum(own.values()) or 1.0
        return {site: noise * own[site] / total for site in sites}

    def _rounding(self, sites: Sequence[SiteId]) -> Iterator[tuple[SiteId, float]]:
        """Power of the rounding error of each site relative to its own."""
        sim = self.sim
        for site in (s for s in sites if s in sim.params):
            yield site, _ratio(_powers(sim, site, [sim.params[site]]))
        activations = [s for s in sites if s not in sim.params]
        for first in range(0, len(activations), TAPS):
            part = activations[first : first + TAPS]
            taps = {site: [Tap(t) for t in sim.plan.observed(site)] for site in part}
            session = sim.backend.session(sim.native, [tap for some in taps.values() for tap in some])
            sums = {site: np.zeros(2) for site in part}
            for batch in self.batches:
                values = session.run(batch)
                for site, some in taps.items():
                    sums[site] += _powers(sim, site, [np.asarray(values[tap]) for tap in some])
            yield from ((site, _ratio(powers)) for site, powers in sums.items())


def _powers(sim: QuantSim, site: SiteId, values: Sequence[Any]) -> NDArray[np.float64]:
    """Sums of squares: of the errors from rounding to a site's grid, and of the values."""
    found = np.zeros(2)
    for value in values:
        exact = np.asarray(value, np.float32)
        error = sim.table[site].fake_quantize(exact) - exact
        found += [np.square(x, dtype=np.float64).sum() for x in (error, exact)]
    return found


def _ratio(powers: NDArray[np.float64]) -> float:
    error, power = powers
    return float(error / power) if power > 0 else 0.0
