"""A simulation for TensorFlow: the model's graph with fake quantization at its sites, to evaluate and to train.

Encodings are numbers in variables, so that `set` assigns a few of them; nothing is built or compiled again. Only a
kind of grid that a site's ops can't compute (another float format, more than 24 bits, many scales for one) builds the
graph again.
Sites that share an encoding share the variables. Where values lie on the grid already (reshape, max pooling, concat,
embedding … of tensors on the same grid) there are no ops. Derived biases stay in float unless an encoding is set for
them.

Sessions for taps are graphs of their own, cut to what the taps need; they take over changed values when they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bitwright.backend import Batch, Session, SimulationBase, Tap, parts_of
from bitwright.graph import ParamId, TensorId
from bitwright.grids import Encoding
from bitwright.placement import Plan, SiteId
from bitwright_tensorflow.graph.canonical import Canonical, recognize
from bitwright_tensorflow.graph.layouts import Layout
from bitwright_tensorflow.graph.model import Array, TfModel, array_of
from bitwright_tensorflow.graph.params import native_values
from bitwright_tensorflow.graph.shapes import Inference
from bitwright_tensorflow.simulate.building import Builder, SimulatedNetwork, chains_of
from bitwright_tensorflow.simulate.fake_quant import SiteForm, numbers
from bitwright_tensorflow.simulate.session import TfSession, known_tensor
from bitwright_tensorflow.simulate.simulated import Assigner, SimulatedModel

LAZY_BYTES = 2**20
"""Bytes of a large network's weight that isn't held on its grid."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """A parameter on its grid, rounded whenever numpy makes an array of it.

    Attributes:
        native: its float values, in native layout.
        form: how they lie in canonical layout.
        encoding: the grid.
    """

    native: Array
    form: Layout
    encoding: Encoding

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.native.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        values = self.encoding.fake_quantize(self.form.canonical(self.native).astype(np.float32))
        return np.asarray(self.form.to_native(values).astype(self.native.dtype), dtype)


class TfSimulation(SimulationBase):
    """`bitwright.backend.Simulation` of a TensorFlow model.

    Args:
        model: the float model; never changed.
        plan, encodings: see `SimulationBase`.

    Raises:
        EncodingError: an encoding is for an unknown or float site, or doesn't fit its tensor.
    """

    def __init__(self, model: TfModel, plan: Plan, encodings: Mapping[SiteId, Encoding | None]) -> None:
        self._found: Canonical = recognize(model)
        super().__init__(self._found.graph, plan, encodings)
        self._float = model
        self._roots = tuple(dict.fromkeys(plan.root(s) for s in self._sites.rounded))
        self._table: dict[SiteId, Encoding] = {}
        self._natives: dict[str, Array] = {}
        self._rounded: dict[SiteId, tuple[Encoding | None, Array | Rounded]] = {}
        self._held = len(parts_of(self._graph, few=True)) == 1
        """Whether weights on their grids are in memory; those of large networks are rounded when they are looked at."""
        self._user: SimulatedModel | None = None
        self._network = SimulatedNetwork(model.copy_meta())
        self.revision = 0
        """How often the graph was built."""
        self.values: dict[str, Any] = {}
        """Contents of the simulated graph's variables, or what becomes such an array; a changed one is another."""
        self._start(encodings)

    def _start(self, encodings: Mapping[SiteId, Encoding | None]) -> None:
        self._chains = chains_of(self._plan, self._roots)
        self._network = self._build()
        self.set(encodings)

    @property
    def source(self) -> TfModel:
        """The float model."""
        return self._float

    @property
    def part(self) -> Inference:
        """What lies between the float model's inputs and outputs."""
        return self._found.network.inference

    @property
    def network(self) -> SimulatedNetwork:
        """The simulated graph."""
        return self._network

    # -- building

    def _build(self) -> SimulatedNetwork:
        """Build the graph for the present chains, with the numbers that `_table` has."""
        builder = Builder(self._float, self._found, self._sites)
        network = builder.for_inference(self._chains)
        self.revision += 1
        self.values = dict(self._float.values)
        self._network, self._user = network, None
        self._write_constants()
        self._put([*self._roots, *(self._plan.root(p) for p in network.quantized)])
        return network

    def _put(self, roots: Sequence[SiteId]) -> dict[str, Any]:
        """Bring the values of some roots' variables up to date; returns what has changed."""
        changed: dict[str, Any] = {}
        for root in dict.fromkeys(roots):
            encoding = self._table.get(root)
            if root in self._network.switches:
                prefix, chain = self._network.switches[root]
                changed[f"{prefix}/on"] = np.asarray(encoding is not None)
                for name, value in numbers(chain.kind, encoding, self._rank(root) if chain.spread else None).items():
                    changed[f"{prefix}/{name}"] = value
            for site in self._plan.tied(root):
                if site in self._network.quantized:
                    changed[self._network.quantized[site]] = self._parameter(site, encoding)
        self.values.update(changed)
        return changed

    def _parameter(self, param: SiteId, encoding: Encoding | None) -> Array | Rounded:
        """A parameter on its grid, in native layout."""
        known = self._rounded.get(param)
        if known is None or known[0] is not encoding:
            native: Array | Rounded = self._native(param)
            if encoding is not None:
                native = Rounded(np.asarray(native), self._found.params[param].form, encoding)
                if self._held or native.nbytes < LAZY_BYTES:
                    native = np.asarray(native)
            known = self._rounded[param] = encoding, native
        return known[1]

    def _native(self, param: SiteId) -> Array:
        if param in self._float.values:
            return np.asarray(self._float.values[param])
        if param not in self._natives:
            node = self._found.network.inference.wiring.nodes[param]
            self._natives[param] = array_of(node.attr["value"].tensor)
        return self._natives[param]

    def _rank(self, site: SiteId) -> int | None:
        if self._sites.is_parameter(site):
            return len(self._graph.params[site].shape)
        shape = self._graph.tensors[site].shape
        return None if shape is None else len(shape)

    # -- the protocol

    @property
    def model(self) -> SimulatedModel:
        """The simulated graph in a session of its own; it follows later changes of encodings."""
        if self._user is None:
            made = self._network
            grids = [name for site in made.sites.values() for name in site.trained]
            self._user = SimulatedModel(
                made.meta, self.values, self._float.inputs, made.outputs, self._float.signature, grids
            )
        return self._user

    def install(self, changes: Mapping[SiteId, Encoding | None]) -> None:
        """See `SimulationBase`."""
        self._table = {**self._table, **{r: e for r, e in changes.items() if e is not None}}
        for root in (r for r, e in changes.items() if e is None):
            self._table.pop(root, None)
        wanted = {r: SiteForm.of(e) for r, e in changes.items() if e is not None and r in self._chains}
        if any(self._chains[r] != chain for r, chain in wanted.items()):
            self._chains.update(wanted)
            self._build()
        else:
            changed = self._put(list(changes))
            if self._user is not None:
                self._user.assign(changed)

    def set_params(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """See `bitwright.backend.ParamUpdates`; `model` follows where they are variables, else it is made anew."""
        natives = native_values(self._float, values)
        for param in values:
            self._rounded.pop(param, None)
        variables = {n: v for n, v in natives.items() if n in self._float.values}
        self._float = self._float.with_values(variables)
        self._natives.update((n, v) for n, v in natives.items() if n not in variables)
        if self._write_constants():
            self._user = None
        changed = {n: v for n, v in natives.items() if n in self.values}
        self.values.update(changed)
        changed |= self._put([self._plan.root(p) for p in values if p in self._plan])
        if self._user is not None:
            self._user.assign(changed)

    def _write_constants(self) -> bool:
        """Bring replaced constants that the graph reads up to date."""
        written = False
        for node in self._network.meta.graph_def.node if self._natives else ():
            if node.op == "Const" and node.name in self._natives:
                node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(self._natives[node.name]))
                written = True
        return written

    def in_force(self) -> Mapping[SiteId, Encoding]:
        """See `SimulationBase`."""
        return self._table

    def open(self, taps: Sequence[Tap], feeds: tuple[TensorId, ...] | None) -> Session:
        """See `SimulationBase`."""
        return SimulatedSession(self, taps, feeds)

    def refresh(self) -> None:
        """Bring `values` up to date, before a session runs."""


class SimulatedSession:
    """`bitwright.backend.Session` in a simulated network; it follows the simulation's numbers from run to run."""

    def __init__(self, simulation: TfSimulation, taps: Sequence[Tap], feeds: tuple[TensorId, ...] | None) -> None:
        self._simulation, self._feeds, self._taps = simulation, feeds, tuple(dict.fromkeys(taps))
        for tensor in (*(t.tensor for t in self._taps), *(feeds or ())):
            known_tensor(simulation.source, tensor)
        self._revision = -1
        self._open()

    def _open(self) -> None:
        simulation, part = self._simulation, self._simulation.part
        aliases = simulation.network.aliases
        self._fed = {t: t for t in simulation.source.inputs}
        if self._feeds is not None:
            self._fed = {t: aliases.get(t, t) for t in self._feeds}
        named = {fed: t for t, fed in self._fed.items()}
        self._session = TfSession(
            simulation.network.meta.graph_def,
            simulation.values,
            self._taps,
            list(named),
            lambda tensor: part.spec(named[tensor]),
            controlled=tuple(part.controlled),
            renamed=aliases,
        )
        self._revision, self._seen = simulation.revision, dict(simulation.values)
        session = getattr(self._session, "session", None)
        self._assigner = None if session is None else Assigner(session)

    @property
    def needs(self) -> tuple[TensorId, ...]:
        """Tensors that `run` must be given."""
        named = {fed: t for t, fed in self._fed.items()}
        return tuple(named.get(t, t) for t in self._session.needs)

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """Feed one batch (model inputs, or the segment's feeds).

        Raises:
            InputError: a needed array is missing or doesn't fit.
        """
        simulation = self._simulation
        simulation.refresh()
        if self._revision != simulation.revision:
            self._open()
        values = simulation.values
        if self._assigner is not None:
            self._assigner.assign({
                n: v for n, v in values.items() if self._seen.get(n) is not v and n in self._assigner
            })  # fmt: skip
            self._seen = dict(values)
        return self._session.run({**batch, **{fed: batch[t] for t, fed in self._fed.items() if t in batch}})
