"""An export proves itself: what was written computes what was simulated, or nothing is handed out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import (
    PartialExecution,
    QuantizedNetwork,
    QuantizedReader,
    Session,
    Simulation,
    Tap,
    parts_of,
    session_in_parts,
    warn_where_it_began,
)
from bitwright.bundle._agreement import Agreement, agreement
from bitwright.bundle._synthetic import synthetic
from bitwright.data import Samples
from bitwright.errors import BitwrightError, ModelError
from bitwright.graph import Graph, TensorId
from bitwright.grids import Encoding
from bitwright.placement import Plan, SiteId, SiteKind
from bitwright.plugins import registry
from bitwright.state import SimState

VALUES_BYTES = 2**29
"""Bytes of tensors that are compared at once; with more, one sample is."""
LARGE_VALUES_BYTES = 2**26
"""The same of a network that is run in parts, whose user may have little memory beside it."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Quantized:
    """A written quantized artefact, and site → tensor in it where they differ."""

    path: Path
    names: Mapping[SiteId, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Simulated:
    """One run of the native simulation on reference samples, and the session that it ran in."""

    samples: Samples
    values: Mapping[TensorId, Array]
    simulation: Simulation[Any]
    session: Session


def simulated(state: SimState, simulate: Callable[[], Simulation[Any]], count: int) -> Simulated | str:
    """The simulation's tensors on the first calibration samples, or on made-up ones; why there are none, in words.

    Where samples don't run apart from the batch that they came in, all of it is taken.
    """
    samples = state.reference
    if samples is None:
        samples = synthetic(state.backend, state.native, state.graph, state.table, count)
    if samples is None:
        return "there were no calibration data, and no made-up input runs: calibrate on data before the export"
    samples = samples.first(count)
    taps = compared_tensors(state.graph, state.plan)
    budget = VALUES_BYTES if len(parts_of(state.graph, few=True)) == 1 else LARGE_VALUES_BYTES
    if _bytes(state.graph, taps, samples) > budget:
        samples = samples.first(1)
    simulation, entire = simulate(), samples.uncut()
    try:
        return run_simulated(state, simulation, samples)
    except BitwrightError:
        if entire is None:
            raise
        try:
            return run_simulated(state, simulation, entire)
        except BitwrightError:
            pass
        raise  # what is wrong with a few samples is easier to see


def run_simulated(
    state: SimState, simulation: Simulation[Any], samples: Samples, session: Session | None = None
) -> Simulated:
    """The tensors that are compared, of the native simulation; `session`: of an earlier run of it."""
    taps = [Tap(t) for t in compared_tensors(state.graph, state.plan)]
    if session is None:
        divisible = isinstance(state.backend, PartialExecution)
        session = session_in_parts(state.graph, simulation, taps) if divisible else simulation.session(taps)
    run = dict(session.run(samples.inputs))
    values = {tap.tensor: np.array(run.pop(tap)) for tap in list(run)}

    def floating(taps: Sequence[Tap]) -> Session:
        return state.backend.session(state.native, taps)

    outputs = [values[t] for t in state.graph.outputs]
    warn_where_it_began(state.graph, outputs, samples.inputs, simulation.session, floating)
    return Simulated(samples, values, simulation, session)


def compared_tensors(graph: Graph, plan: Plan) -> list[TensorId]:
    """Quantized activations and the model's outputs, in the order of the network."""
    sites = {s for s in plan.quantized if plan[s].kind is SiteKind.ACTIVATION and s in graph.tensors}
    wanted = sites | set(graph.outputs)
    order = [*graph.inputs, *(t for op in graph for t in op.outputs)]
    return [t for t in dict.fromkeys(order) if t in wanted]


def _bytes(graph: Graph, tensors: Sequence[TensorId], samples: Samples) -> int:
    lengths = [len(v) for v in samples.inputs.values() if v.ndim]
    total = 0
    for tensor in tensors:
        shape = graph.tensors[tensor].shape or ()
        total += 4 * int(np.prod([n if n is not None else (lengths[0] if i == 0 and lengths else 64)
                                  for i, n in enumerate(shape)], dtype=np.int64))  # fmt: skip
    return total


def gate(state: SimState, run: Simulated, artefacts: Sequence[Quantized]) -> tuple[int, dict[TensorId, str]]:
    """Compare the simulation with each quantized artefact.

    Returns:
        How many tensors were compared, and those that couldn't be, with the reason.

    Raises:
        ModelError: a tensor departs (the message names the first one), or an artefact can't be run at all.
    """
    compared: set[TensorId] = set()
    unreached: dict[TensorId, str] = {}
    for artefact in artefacts:
        network = open_quantized(artefact.path)
        if network is None:
            continue
        expected, inputs = dict(run.values), dict(run.samples.inputs)
        handed = [t for t in network.inputs if t in state.graph.tensors and t not in inputs]
        if missing := [t for t in handed if t not in expected]:
            # Of a model in parts: what its Python hands to a part.
            session = run.simulation.session([Tap(t) for t in missing])
            expected |= {tap.tensor: np.array(v) for tap, v in session.run(inputs).items()}
        inputs |= {t: expected[t] for t in handed}
        found = compare(
            state.graph, expected, inputs, network, state.table, artefact.names, [*state.graph.inputs, *handed]
        )
        if found.refused:
            raise ModelError(
                f"{artefact.path.name} can't be run, so nothing is exported: {found.refused}. This is a fault of the "
                "export; leave the op in float (overrides) or report it"
            )
        if found.first is not None:
            raise ModelError(
                f"{artefact.path.name} doesn't compute what was simulated, so nothing is exported: "
                f"{found.first}, on equal inputs{_counted(len(found.departures))}. "
                "This is a fault of the export; leave the op in float (overrides) or report it"
            )
        compared.update(found.compared)
        unreached |= found.unreached
    return len(compared), {t: why for t, why in unreached.items() if t not in compared}


def _counted(departures: int) -> str:
    return "" if departures == 1 else f" (and {departures - 1} more tensors)"


def open_quantized(path: Path) -> QuantizedNetwork | None:
    """The artefact as a network; None where no backend reads its format."""
    try:
        backend = registry.backend_for_path(path)
    except BitwrightError:
        return None
    return backend.open_quantized(path) if isinstance(backend, QuantizedReader) else None


def compare(
    graph: Graph,
    expected: Mapping[TensorId, Array],
    inputs: Mapping[str, Array],
    network: QuantizedNetwork,
    table: Mapping[SiteId, Encoding],
    names: Mapping[SiteId, str],
    entries: Collection[TensorId] | None = None,
) -> Agreement:
    """`agreement` with an artefact that may call tensors otherwise, or have only some of them."""
    known = {t for t in expected if names.get(t, t) in network.tensors}
    return agreement(graph, expected, inputs, Renamed(network, names), table, known=known, entries=entries)


@dataclass(frozen=True)
class Renamed:
    """A network under the graph's names."""

    network: QuantizedNetwork
    names: Mapping[TensorId, str]

    def session(self, taps: Sequence[Tap]) -> Session:
        """See `Divisible`."""
        return _RenamedSession(self.network.session([Tap(self._of(t.tensor)) for t in taps]), taps, self.names, ())

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """See `Divisible`; feeds that the artefact hasn't got, or that are tapped, are left out."""
        wanted = {self._of(t.tensor) for t in taps}
        fed = [t for t in feeds if self._of(t) in self.network.tensors and self._of(t) not in wanted]
        own = list(dict.fromkeys(map(self._of, fed)))
        session = self.network.segment(own, [Tap(n) for n in dict.fromkeys(self._of(t.tensor) for t in taps)])
        return _RenamedSession(session, taps, self.names, tuple(fed))

    def _of(self, tensor: TensorId) -> str:
        return self.names.get(tensor, tensor)


@dataclass(frozen=True)
class _RenamedSession:
    session: Session
    taps: Sequence[Tap]
    names: Mapping[TensorId, str]
    fed: tuple[TensorId, ...]

    def run(self, batch: Mapping[TensorId, Array]) -> dict[Tap, Array]:
        """Feed by the graph's names, and hand out so."""
        if self.fed:
            feeds = {self.names.get(t, t): batch[t] for t in self.fed}
        else:
            feeds = {**batch, **{self.names[t]: v for t, v in batch.items() if t in self.names}}
        found = {tap.tensor: v for tap, v in self.session.run(feeds).items()}
        return {tap: found[self.names.get(tap.tensor, tap.tensor)] for tap in self.taps}


def simulation_network(simulation: Simulation[Any], tensors: Sequence[TensorId]) -> QuantizedNetwork:
    """A simulation in the place of an artefact, with the tensors that its graph has."""
    return _SimulationNetwork(simulation, frozenset(tensors))


@dataclass
class _SimulationNetwork:
    simulation: Simulation[Any]
    tensors: frozenset[TensorId]
    inputs: tuple[TensorId, ...] = ()

    def session(self, taps: Sequence[Tap]) -> Session:
        """See `QuantizedNetwork`."""
        return self.simulation.session(taps)

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> Session:
        """See `QuantizedNetwork`."""
        return self.simulation.segment(feeds, taps)
