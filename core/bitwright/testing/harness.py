"""Run one technique alone on any backend: plan, encodings, statistics, walk and store as simple as they can be.

The walk here runs both networks from the start for each layer. It is slow and plainly right, and so also the
yardstick for the real one (`bitwright.layerwise._walk`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Batch, Branching, Params, Session, Simulation, Tap
from bitwright.graph import Edit, Graph, OpId, OpKind, ParamRole, SetBias, SetParams, to_matrix
from bitwright.grids import (
    Encoding,
    EncodingTable,
    PerChannel,
    QuantSpec,
    dynamic_encoding,
    encoding_from_range,
    to_groups,
)
from bitwright.layerwise import BlockwiseWalk, dump, load
from bitwright.placement import Float, Plan, Site, SiteId, SiteKind
from bitwright.statistics import LayerMoments, Request, Statistic
from bitwright.technique import Context, Layer, LayerResult, Outcome, Technique, require_data

Array = NDArray[Any]
UINT8 = QuantSpec(8, signed=False, symmetric=False)
INT8 = QuantSpec(8)


def simple_plan(graph: Graph, *, weights: QuantSpec = INT8, activations: QuantSpec | None = UINT8) -> Plan:
    """Every weight of a linear op and every float tensor quantized; no ties, biases in float.

    Args:
        graph: the model's.
        weights: specification of weights; a per-channel one gets the output axis of each op.
        activations: specification of activations; None leaves them in float.
    """
    sites: dict[SiteId, Site] = {}
    for t in graph.tensors.values():
        producer = graph.producer(t.id)
        kept = activations if activations is not None else Float("activations stay in float")
        decision = kept if t.is_float else Float("not a float tensor")
        sites[t.id] = Site(t.id, SiteKind.ACTIVATION, decision, producer.id if producer else None)
    for op in graph.linear_ops:
        assert op.weight is not None
        spec = weights
        if isinstance(weights.granularity, PerChannel) and op.kind is OpKind.CONV_TRANSPOSE:
            spec = weights.with_(granularity=PerChannel(1))
        sites[op.weight] = Site(op.weight, SiteKind.PARAMETER, spec, op.id, ParamRole.WEIGHT)
    return Plan(sites, "simple")


def min_max_encodings(
    backend: Backend[Any],
    model: object,
    plan: Plan,
    data: Sequence[Batch],
    kept: Mapping[SiteId, Encoding] | None = None,
) -> EncodingTable:
    """Ranges of weights by their values and of activations by the float network; `kept` ones stay."""
    table = dict(kept or {})
    values = backend.read(model, [s for s in plan.parameters if s not in table])
    for site in values:
        spec = plan.spec(site)
        assert spec is not None
        groups = to_groups(np.asarray(values[site]), spec.granularity)
        table[site] = encoding_from_range(spec, groups.min(axis=-1), groups.max(axis=-1), source="minmax")
    sites = [s for s in plan.activations if s not in table]
    taps = [Tap(s, "minmax") for s in sites]
    session = backend.session(model, taps)
    ranges = [session.run(batch) for batch in data] if taps else []
    for site, tap in zip(sites, taps, strict=True):
        spec = plan.spec(site)
        if spec is not None and spec.run_time is not None:
            table[site] = dynamic_encoding(spec)
        elif spec is not None and ranges:
            low = min(float(np.asarray(r[tap])[0]) for r in ranges)
            high = max(float(np.asarray(r[tap])[1]) for r in ranges)
            table[site] = encoding_from_range(spec, low, high, source="minmax")
    return EncodingTable(table)


class MemoryStore:
    """Finished results in memory. `fail_after` makes the put after so many raise `Interrupted`, as a crash would."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.entries: dict[str, dict[str, Array]] = {}
        self.fail_after = fail_after

    def get(self, key: str) -> Mapping[str, Array] | None:
        """A copy of what was stored."""
        found = self.entries.get(key)
        return None if found is None else {k: v.copy() for k, v in found.items()}

    def put(self, key: str, arrays: Mapping[str, Array]) -> None:
        """Store copies.

        Raises:
            Interrupted: so many have been stored.
        """
        if self.fail_after is not None and len(self.entries) >= self.fail_after:
            raise Interrupted(f"interrupted before storing {key!r}")
        self.entries[key] = {k: np.array(v) for k, v in arrays.items()}


class Interrupted(Exception):
    """The crash that `MemoryStore` plays."""


class Quiet:
    """Progress that counts and shows nothing."""

    def __init__(self) -> None:
        self.steps = 0

    def start(self, description: str, total: int | None) -> None:
        """Nothing to show."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count."""
        self.steps += steps

    def finish(self) -> None:
        """Nothing to close."""


@dataclass
class SimpleWalk:
    """`LayerWalk` by running the whole float and the whole quantized network again for each layer.

    Attributes:
        visited: ops that `solve` was called for, in order; a resumed op isn't among them.
        layers: what `solve` was given, by op; always with second moments, for judging.
    """

    backend: Backend[Any]
    model: object
    plan: Plan
    encodings: EncodingTable
    data: Sequence[Batch]
    store: MemoryStore
    visited: list[OpId] = field(default_factory=list)
    layers: dict[OpId, Layer] = field(default_factory=dict)

    def __call__(
        self,
        ops: Sequence[OpId],
        solve: Callable[[Layer], LayerResult],
        *,
        quantized_inputs: bool = True,
        quantized_activations: bool = True,
        products: bool = True,
        residuals: bool = False,
        moments_gib: float | None = None,
        column_blocks: bool = False,
        thin: int | None = None,
    ) -> dict[OpId, LayerResult]:
        """See `LayerWalk`; every layer's moments are collected, however large."""
        graph = self.backend.graph(self.model)
        current, encodings = self.model, self.encodings
        results: dict[OpId, LayerResult] = {}
        for op in (op for op in graph.linear_ops if op.id in set(ops)):
            assert op.weight is not None
            key = f"layer/{op.id}"
            result = load(self.store.get(key))
            if result is None:
                layer = self._layer(op.id, current, encodings, quantized_inputs, quantized_activations, thin)
                self.visited.append(op.id)
                self.layers[op.id] = layer
                result = solve(layer if products else replace(layer, moments=_means_only(layer.moments)))
                self.store.put(key, dump(result))
            changes: list[Edit] = [SetParams({op.weight: result.weight})]
            if result.bias is not None:
                changes.append(SetBias(op.id, result.bias))
            current = self.backend.edit(current, changes)
            encodings = encodings.merged({op.weight: result.encoding})
            results[op.id] = result
        return results

    def _layer(
        self,
        id: OpId,
        current: object,
        encodings: EncodingTable,
        quantized: bool,
        activations: bool,
        thin: int | None,
    ) -> Layer:
        op = self.backend.graph(self.model).op(id)
        assert op.weight is not None
        bias = op.params.get(ParamRole.BIAS)
        values = self.backend.read(self.model, [p for p in (op.weight, bias) if p is not None])
        tap = Tap(op.data_inputs[0])
        axis = self.backend.graph(self.model).tensors[tap.tensor].channel_axis
        features = to_matrix(op, values[op.weight]).shape[2]
        moments = LayerMoments(op, features, axis, paired=quantized, thin=thin)
        sessions = [self.backend.session(self.model, [tap])]
        if quantized:
            simulation = self.backend.simulate(current, self.plan, encodings)
            if not activations:
                simulation.set({s: None for s, x in self.plan.items() if x.kind is SiteKind.ACTIVATION})
            sessions.append(simulation.session([tap]))
        for batch in self.data:
            moments.update(*(np.asarray(s.run(batch)[tap]) for s in sessions))
        return Layer(
            op,
            _sealed(values[op.weight]),
            None if bias is None else _sealed(values[bias]),
            moments,
            encodings[op.weight],
        )


def _means_only(moments: LayerMoments) -> LayerMoments:
    features = moments.mean.shape[1]
    bare = LayerMoments(
        moments.op, features, moments.channel_axis, paired=moments.paired, products=False, thin=moments.thin
    )
    bare.restore(moments.state())
    return bare


@dataclass(frozen=True)
class Applied:
    """What `run_technique` did.

    Attributes:
        outcome: the technique's.
        model: the model with it applied.
        context: what the technique saw.
        encodings: those of the context with the outcome's, weights measured again where they changed.
        walk: the walk, if there were data.
    """

    outcome: Outcome
    model: object
    context: Context[Any]
    encodings: EncodingTable
    walk: SimpleWalk | None


def run_technique(
    technique: Technique,
    backend: Backend[Any],
    model: object,
    data: Sequence[Batch] = (),
    *,
    plan: Plan | None = None,
    encodings: Mapping[SiteId, Encoding] | None = None,
    folded: Mapping[OpId, tuple[NDArray[np.float32], NDArray[np.float32]]] | None = None,
    store: MemoryStore | None = None,
    seed: int = 0,
    **settings: Any,
) -> Applied:
    """Apply a technique to a model and return all that a test may want to look at.

    Args:
        technique, backend, model: any.
        data: calibration batches; none for techniques that need none.
        plan: default `simple_plan`.
        encodings: default min-max.
        folded: as `Context.folded`.
        store: to resume from.
        seed: of the run.
        settings: the technique's own.

    Raises:
        InputError: the technique needs data and there are none.
    """
    graph = backend.graph(model)
    plan = simple_plan(graph) if plan is None else plan
    table = min_max_encodings(backend, model, plan, data, encodings)
    store = MemoryStore() if store is None else store
    chosen: Any = technique.Settings(**settings)
    walk = SimpleWalk(backend, model, plan, table, data, store) if data else None
    params: Params = {p: _sealed(v) for p, v in backend.read(model, list(graph.params)).items()}
    requests = list(technique.statistics(graph, plan, chosen))
    if not data:
        require_data(technique, requests, chosen)
        requests = []
    simulation = backend.simulate(model, plan, table) if requests else None
    statistics = {r.key: _collect(r, backend, model, simulation, data) for r in requests}
    given: Any = data
    blocks = BlockwiseWalk(backend, model, graph, plan, table, given, store, Quiet(), name=technique.name)
    branches: dict[str, Any] = {}
    if isinstance(backend, Branching):
        branches["branch_obstacle"] = partial(backend.branch_obstacle, model)
    context = Context(
        graph, plan, params, table, statistics, chosen, walk, store, Quiet(), seed, dict(folded or {}),
        blocks if data else None, **branches,
    )  # fmt: skip
    outcome = technique.apply(context)
    changes = [*outcome.edits, *([SetParams(outcome.params)] if outcome.params else [])]
    changed = backend.edit(model, changes) if changes else model
    kept = {s: e for s, e in table.items() if s not in outcome.params} | dict(outcome.encodings)
    after = backend.graph(changed)
    kept = {s: e for s, e in kept.items() if s in after.tensors or s in after.params}
    new_plan = plan if set(plan) <= {*after.tensors, *after.params} else simple_plan(after)
    return Applied(outcome, changed, context, min_max_encodings(backend, changed, new_plan, data, kept), walk)


def _sealed(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A read-only copy, so that a technique that writes into its inputs fails at once."""
    copy = np.array(values, np.float32)
    copy.setflags(write=False)
    return copy


def _collect(
    request: Request, backend: Backend[Any], model: object, simulation: Simulation[Any] | None, data: Sequence[Batch]
) -> Statistic:
    statistic = request.make()
    taps = [Tap(t, statistic.reduction, statistic.axis) for t in request.tensors]
    sessions: list[Session] = []
    for tap, source in zip(taps, request.sources, strict=True):
        simulated = source == "simulated" and simulation is not None
        sessions.append(simulation.session([tap]) if simulated else backend.session(model, [tap]))  # type: ignore[union-attr]
    for batch in data:
        statistic.update(*(np.asarray(s.run(batch)[t]) for s, t in zip(sessions, taps, strict=True)))
    return statistic
