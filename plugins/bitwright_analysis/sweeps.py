"""Quantizing one thing at a time, and everything but one thing, without building the simulation anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.backend import Simulation
from bitwright.graph import Graph, Op, OpId, ParamRole
from bitwright.grids import Encoding
from bitwright.placement import Plan, SiteId, SiteKind
from bitwright.progress import Progress, Store, stage
from bitwright.report import finite
from bitwright_analysis.records import Sensitivity
from bitwright_analysis.scoring import Judge, OutputNoise, decibels


@dataclass(frozen=True)
class Unit:
    """What is switched together: the root of one grid, or all roots of one layer.

    Attributes:
        name: the site, or the layer's op.
        kind: "weight", "parameter", "activation" or "layer".
        roots: the sites that hold the encodings.
        op: the op it belongs to; None for a model input.
    """

    name: str
    kind: str
    roots: tuple[SiteId, ...]
    op: Op | None
    bits: str


class Switches:
    """Switches sites of a simulation on and off.

    Args:
        simulation: any; its encodings are replaced by those of the table.
        plan: the sites.
        table: one encoding for each quantized site, derived biases included (`QuantSim.table`).
    """

    def __init__(self, simulation: Simulation[Any], plan: Plan, table: Mapping[SiteId, Encoding]) -> None:
        self.simulation = simulation
        self._table = {site: e for site, e in table.items() if plan.root(site) == site}
        self.weights = frozenset(s for s in plan.parameters if s in self._table)
        self.activations = frozenset(s for s in plan.activations if s in self._table)
        self.biases = frozenset(self._table) - self.weights - self.activations
        self.roots = frozenset(self._table)
        simulation.set(self._table)
        self._on = frozenset(self._table)

    def only(self, roots: Collection[SiteId]) -> None:
        """These on, everything else in float. Derived biases go with their operands, so they are off."""
        self._switch(frozenset(roots))

    def all_but(self, roots: Collection[SiteId]) -> None:
        """Everything on but these."""
        self._switch(frozenset(self._table) - frozenset(roots))

    def _switch(self, wanted: frozenset[SiteId]) -> None:
        changes: dict[SiteId, Encoding | None] = dict.fromkeys(self._on - wanted)
        changes |= {s: self._table[s] for s in wanted - self._on}
        if changes:
            self.simulation.set(changes)
        self._on = wanted


def units(graph: Graph, plan: Plan) -> list[Unit]:
    """Every root with a grid of its own, then every layer that has more than one, in the order of the network."""
    bits = {row.site: row.bits for row in plan.table()}
    found: list[Unit] = []
    layers: dict[OpId, list[SiteId]] = {}
    for site in (s for s in plan if s in plan.activations or s in plan.parameters):
        entry = plan[site]
        if entry.kind is SiteKind.PARAMETER:
            op = graph.op(entry.op) if entry.op is not None else None
            kind = "weight" if entry.role is ParamRole.WEIGHT else "parameter"
        else:
            op, kind = layer_of(graph, plan, site), "activation"
        found.append(Unit(site, kind, (site,), op, bits[site]))
        if op is not None:
            layers.setdefault(op.id, []).append(site)
    order = {op.id: i for i, op in enumerate(graph.ops)}
    for name in sorted(layers, key=order.__getitem__):
        sites = layers[name]
        widths = " and ".join(dict.fromkeys(bits[s] for s in sites))
        found.append(Unit(name, "layer", tuple(sites), graph.op(name), widths))
    return found


def layer_of(graph: Graph, plan: Plan, site: SiteId) -> Op | None:
    """The op whose result a quantized activation is: where a target fuses several (conv, batch norm, ReLU), the first.

    None for a model input.
    """
    op = graph.producer(site)
    while op is not None and op.data_inputs:
        before = op.data_inputs[0]
        producer = graph.producer(before)
        if producer is None or before in plan.quantized or graph.sole_consumer(before) is not op:
            return op
        op = producer
    return op


def sweep(
    switches: Switches,
    judge: Judge,
    switched: Sequence[Unit],
    store: Store,
    progress: Progress,
    directions: Collection[str],
) -> dict[tuple[str, str, str], float]:
    """The judge's figure for each (direction, kind, unit); finished ones come from the store.

    Args:
        directions: "alone" (this unit on, all else off) and "without" (all on but this).
    """
    jobs = [(d, u) for d in ("alone", "without") if d in directions for u in switched]
    same = {u.roots: u for u in switched if u.kind != "layer"}
    found: dict[tuple[str, str, str], float] = {}
    with stage(progress, "Sensitivities", len(jobs)):
        for direction, unit in jobs:
            twin = same.get(unit.roots)
            known = None if twin is None else found.get((direction, twin.kind, twin.name))
            if known is None:
                on = unit.roots if direction == "alone" else switches.roots - frozenset(unit.roots)
                known = measured(switches, judge, f"{direction}/{judge.name}/{unit.kind}/{unit.name}", on, store)
            found[direction, unit.kind, unit.name] = known
            progress.advance(note=unit.name)
    return found


def measured(switches: Switches, judge: Judge, key: str, on: Collection[SiteId], store: Store) -> float:
    """The judge's figure with these roots on and all else in float; from the store if it is there."""
    stored = store.get(key)
    if stored is not None:
        return float(stored["value"])
    switches.only(on)
    value = judge(switches.simulation)
    store.put(key, {"value": np.array(value)})
    return value


def ranked(
    switched: Sequence[Unit],
    found: Mapping[tuple[str, str, str], float],
    judge: Judge,
    reference: float,
    quantized: float,
    *,
    larger_is_better: bool = True,
) -> list[Sensitivity]:
    """The units with what they do, the worst first.

    Args:
        reference, quantized: the judge's figure for the float model and with everything quantized.
        larger_is_better: of a score; noise is better small.
    """
    noise = isinstance(judge, OutputNoise)
    sign = -1.0 if noise or not larger_is_better else 1.0
    rows = []
    for unit in switched:
        alone, without = (found.get((d, unit.kind, unit.name)) for d in ("alone", "without"))
        harm = None if alone is None else sign * (reference - alone)
        gain = None if without is None else sign * (without - quantized)
        rows.append(
            Sensitivity(
                unit=unit.name,
                kind=unit.kind,
                op="" if unit.op is None else unit.op.id,
                type="" if unit.op is None else unit.op.type,
                bits=unit.bits,
                alone=None if alone is None else decibels(alone) if noise else finite(alone),
                without=None if without is None else decibels(without) if noise else finite(without),
                harm=harm if harm is not None else gain if gain is not None else 0.0,
                gain=gain,
            )
        )
    total = sum(max(r.harm, 0.0) for r in rows if r.kind != "layer") or 1.0
    rows = [r.model_copy(update={"share": max(r.harm, 0.0) / total}) for r in rows]
    return sorted(rows, key=lambda r: (-r.harm, -(r.gain or 0.0)))
