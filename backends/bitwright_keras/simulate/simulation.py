"""A simulation for Keras: the normal form with `FakeQuantize` layers at its sites, a `keras.Model` to run or train.

Setting an encoding assigns a few numbers, and for a weight its quantized values; nothing is compiled again unless the
kind of grid changes (integer to float, per tensor to per channel). Sites that share an encoding share one layer. Where
values lie on the grid already (reshape, max pooling, concat, embedding … of tensors on the same grid) no layer is
called.

For evaluation, weights are held quantized: inference costs what the float model's does, beside the activations. For
training, they are held in float and quantized in each call (`weights.QuantizedLayer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Session, SimulationBase, Tap, Training
from bitwright.errors import ModelError
from bitwright.graph import ParamId, TensorId, free_name
from bitwright.grids import Encoding
from bitwright.placement import Derived, Plan, SiteId
from bitwright_keras.graph.canonical import ParamPlace, canonical
from bitwright_keras.graph.constants import with_constant, with_operand
from bitwright_keras.graph.engine import value_of
from bitwright_keras.graph.model import KerasModel, Node, Ref, variables_of
from bitwright_keras.graph.native import copy_layer, copy_of, keras_model
from bitwright_keras.graph.params import array_of, native_value, native_values, with_values
from bitwright_keras.simulate.fake_quant import FakeQuantize
from bitwright_keras.simulate.pullback import KerasPullback
from bitwright_keras.simulate.session import KerasSession
from bitwright_keras.simulate.weights import QuantizedLayer, constant


@dataclass(frozen=True)
class _Parameter:
    """A quantized parameter of a simulation.

    Attributes:
        place: in the float model.
        variable: that the simulation computes with; in training, the float one.
        quantizer: in training, of a layer's parameter.
    """

    place: ParamPlace
    variable: keras.Variable
    quantizer: FakeQuantize | None = None


class KerasSimulation(SimulationBase):
    """`bitwright.backend.TrainableSimulation` of a model in normal form.

    Args:
        model: the float model; never changed.
        plan, encodings: see `SimulationBase`.
        trainable: how grids are trained. By default those of weights follow the weights where these change.

    Raises:
        EncodingError: an encoding is for an unknown or float site, or doesn't fit its tensor.
    """

    def __init__(
        self,
        model: KerasModel,
        plan: Plan,
        encodings: Mapping[SiteId, Encoding | None],
        *,
        trainable: bool | Training = False,
    ) -> None:
        super().__init__(canonical(model).graph, plan, encodings)
        self._float = model
        self._training = Training() if trainable is True else trainable or None
        self.generation = 0
        """How often the network has been built."""
        self._replaced: dict[ParamId, NDArray[Any]] = {}
        self._table: dict[SiteId, Encoding | None] = self._sites.changes(encodings)
        self._build()

    # -- building

    def _build(self) -> None:
        self.generation += 1
        self._native: keras.Model | None = None
        self._twins: dict[int, Any] = {}
        self._owned: set[int] = set()
        self._activations: dict[SiteId, FakeQuantize] = {}
        self._parameters: dict[SiteId, _Parameter] = {}
        self._aliases: dict[TensorId, TensorId] = {}
        self._names = {n.operation.name for n in self._float.nodes} | set(self._float.inputs)
        nodes, specs = self._with_parameters(), dict(self._float.specs)
        at = {site: self._quantizer(site) for site in self._sites.rounded}
        made: list[Node] = []
        for site in self._float.inputs:
            if site in at:
                inner = self._aliases[site] = f"{site}/quantized"
                specs[inner] = specs[site]
                made.append(Node(inner, at[site], (Ref(site),), {}, (inner,)))
        for node in nodes:
            node = node.rewired(self._aliases)
            wanted = [t for t in node.outputs if t in at]
            raw = {t: f"{t}/float" for t in wanted}
            made.append(replace(node, outputs=tuple(raw.get(t, t) for t in node.outputs)))
            for t in wanted:
                specs[raw[t]] = specs[t]
                made.append(Node(f"{t}/fake_quant", at[t], (Ref(raw[t]),), {}, (t,)))
        # An output that is an input is handed out as it came.
        self._model = self._float.with_(nodes=tuple(made), specs=specs)
        self._owned |= {id(q) for q in self._activations.values()}
        for param, native in dict(self._replaced).items():
            self._write(param, native)
        for root, encoding in self._table.items():
            self._install(root, encoding)

    def _with_parameters(self) -> list[Node]:
        """The float model's calls, by layers whose parameters are quantized."""
        places = canonical(self._float).places
        sites = [s for s in self._sites.parameters if s in places]
        by_layer: dict[int, dict[str, SiteId]] = {}
        constants: dict[str, SiteId] = {}
        for site in sites:
            place = places[site]
            if place.node.layer is None:
                constants[place.node.op] = site
            else:
                by_layer.setdefault(id(place.node.layer), {})[place.key] = site
        made: list[Node] = []
        layers: dict[int, Any] = {}
        for node in self._float.nodes:
            if node.layer is not None and (id(node.layer) in by_layer or self._training is not None):
                if id(node.layer) not in layers:
                    layers[id(node.layer)] = self._layer(node.layer, by_layer.get(id(node.layer), {}))
                node = replace(node, operation=layers[id(node.layer)])
            elif self._training is not None:
                node = replace(node, operation=copy_of(node.operation))
                self._owned.add(id(node.operation))
            if node.op in constants:
                made.extend(self._constant(node, constants[node.op]))
            else:
                made.append(node)
        return made

    def _layer(self, layer: keras.layers.Layer, sites: Mapping[str, SiteId]) -> keras.layers.Layer:
        twin = copy_layer(layer)
        places = canonical(self._float).places
        self._twins[id(layer)] = twin
        result: keras.layers.Layer = twin
        variables = variables_of(twin)
        quantizers: dict[str, FakeQuantize] = {}
        for key, site in sites.items():
            if self._training is not None:
                quantizers[key] = self._weight_quantizer(site, places[site])
            self._parameters[site] = _Parameter(places[site], variables[key], quantizers.get(key))
        if quantizers:
            result = QuantizedLayer(twin, quantizers, name=twin.name, dtype=twin.dtype_policy)
        self._owned.add(id(result))
        return result

    def _weight_quantizer(self, site: SiteId, place: ParamPlace) -> FakeQuantize:
        assert self._training is not None
        encoding = self._table.get(self._plan.root(site))
        derived = isinstance(self._plan[site].decision, Derived)
        learns = self._training.range_learning and encoding is not None and not derived
        layout = place.layout
        return FakeQuantize(
            encoding, (layout.native, layout.order, layout.shape), learns=learns, evened=self._training.gradient_scale,
            follows=not learns and not derived, name=self._file_name(f"{site}_quantizer"),
        )  # fmt: skip

    def _constant(self, node: Node, site: SiteId) -> list[Node]:
        """A constant operand as a layer of its own."""
        place = canonical(self._float).places[site]
        key = next(k for k, p in node.params.items() if p == site)
        value = native_value(place)
        layer = constant(value, self._file_name(f"{site}_value"), self._float.specs[node.outputs[0]].dtype)
        self._owned.add(id(layer))
        self._parameters[site] = _Parameter(place, layer.value)
        read = Node(f"{site}/value", layer, (Ref(node.inputs[0]),), {}, (site,))
        return [read, with_operand(node, key, Ref(site))]

    def _quantizer(self, site: SiteId) -> FakeQuantize:
        root = self._plan.root(site)
        if root not in self._activations:
            encoding = self._table.get(root)
            learns = (
                self._training is not None
                and self._training.range_learning
                and encoding is not None
                and not self._sites.is_parameter(root)
            )
            self._activations[root] = FakeQuantize(
                encoding, learns=learns, evened=bool(self._training and self._training.gradient_scale),
                name=self._file_name(f"{root}_fake_quant"), dtype=self._float.specs[site].dtype,
            )  # fmt: skip
        return self._activations[root]

    def _file_name(self, wanted: str) -> str:
        found = free_name(wanted.replace("/", "_").replace(":", "_"), self._names)
        self._names.add(found)
        return found

    # -- the protocol

    @property
    def model(self) -> keras.Model:
        """The simulated model. That of `trainable=False` is for evaluation: it has no trainable weights."""
        if self._native is None:
            self._native = keras_model(self._model, keep=self._owned if self._training is None else None)
            if self._training is None:  # what is held quantized can't be trained: `QuantSim.trainable` makes what can
                self._native.trainable = False
        return self._native

    def install(self, changes: Mapping[SiteId, Encoding | None]) -> None:
        """See `SimulationBase`; where the kind of grid changes, `model` is another object afterwards."""
        if all(self._takes(root, encoding) for root, encoding in changes.items()):
            for root, encoding in changes.items():
                self._table[root] = encoding
                self._install(root, encoding)
            return
        if self._training is not None:
            self._table = dict(self.in_force())
            self._float, self._replaced = self.float_model(), {}
        self._table.update(changes)
        self._build()

    def set_params(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """See `bitwright.backend.ParamUpdates`: layers that are written become the simulation's own, grids stay."""
        natives = native_values(self._float, values)
        kept = self.grids_of(values)
        for param, native in natives.items():
            self._write(param, native)
        for root, encoding in kept.items():
            self._install(root, encoding)

    def _write(self, param: ParamId, native: NDArray[Any]) -> None:
        held, place = self._parameters.get(param), canonical(self._float).places[param]
        if held is None and place.node.layer is None:
            changed = (with_constant(n, place.key, native) if n.op == place.node.op else n for n in self._model.nodes)
            self._model, self._native = self._model.with_(nodes=tuple(changed)), None
            self._replaced[param] = native
            return
        variable = variables_of(self._own(place.node.layer))[place.key] if held is None else held.variable
        variable.assign(native)
        self._replaced[param] = array_of(variable)  # in the variable's precision

    def _own(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        """The simulation's own copy of a layer, which until now it may have shared with the float model."""
        if id(layer) not in self._twins:
            twin = self._twins[id(layer)] = copy_layer(layer)
            self._owned.add(id(twin))
            nodes = (replace(n, operation=twin) if n.operation is layer else n for n in self._model.nodes)
            self._model, self._native = self._model.with_(nodes=tuple(nodes)), None
        return self._twins[id(layer)]

    def _takes(self, root: SiteId, encoding: Encoding | None) -> bool:
        quantizers = [self._activations.get(root)]
        quantizers += [p.quantizer for s in self._plan.tied(root) if (p := self._parameters.get(s)) is not None]
        return all(q.takes(encoding) for q in quantizers if q is not None)

    def _install(self, root: SiteId, encoding: Encoding | None) -> None:
        if root in self._activations:
            self._activations[root].set(encoding)
        for site in self._plan.tied(root):
            held = self._parameters.get(site)
            if held is None:
                continue
            if held.quantizer is not None:
                held.quantizer.set(encoding, value_of(held.variable))
                continue
            native = self._replaced[site] if site in self._replaced else native_value(held.place)
            if encoding is not None:
                whole = np.asarray(held.place.layout.canonical(native), np.float32)
                native = held.place.layout.to_native(encoding.fake_quantize(whole))
            held.variable.assign(native)

    def in_force(self) -> dict[SiteId, Encoding | None]:
        """See `SimulationBase`."""
        found = dict(self._table)
        if self._training is None:
            return found
        for root, quantizer in self._activations.items():
            if not self._sites.is_parameter(root):
                found[root] = quantizer.get()
        for site, held in self._parameters.items():
            if held.quantizer is not None and self._plan.root(site) == site:
                found[site] = held.quantizer.get(value_of(held.variable))
        return found

    def open(self, taps: Sequence[Tap], feeds: tuple[TensorId, ...] | None) -> Session:
        """See `SimulationBase`."""
        return SimulatedSession(self, taps, feeds)

    def opened(self, taps: Sequence[Tap], feeds: Sequence[TensorId] | None) -> KerasSession:
        """A session of the network as it is now."""
        return KerasSession(self._model, self._graph, taps, feeds, self._aliases, self._switches)

    def pullback(self, params: Sequence[ParamId], feeds: Sequence[TensorId], taps: Sequence[TensorId]) -> KerasPullback:
        """See `bitwright.backend.DifferentiableSimulation`; it holds as long as no grid becomes one of another kind."""
        if missing := [p for p in params if p not in self._parameters]:
            raise ModelError(f"{missing[0]!r} is no parameter that the plan quantizes")
        session = KerasSession(self._model, self._graph, [Tap(t) for t in taps], feeds, self._aliases)
        return KerasPullback(session, {p: (self._parameters[p].variable, self._parameters[p].place) for p in params})

    def _switches(self) -> tuple[bool, ...]:
        held = (p.quantizer for p in self._parameters.values() if p.quantizer is not None)
        return tuple(q.on for q in (*self._activations.values(), *held))

    # -- after training

    def float_model(self) -> KerasModel:
        """The float model with the simulation's present weights and running statistics, in memory of its own."""
        made: dict[int, keras.layers.Layer] = {}
        nodes = []
        for node in self._float.nodes:
            if node.layer is not None and node.layer.variables:
                if id(node.layer) not in made:
                    made[id(node.layer)] = copy_layer(node.layer, source=self._twins.get(id(node.layer)))
                node = replace(node, operation=made[id(node.layer)])
            nodes.append(node)
        model, places = self._float.with_(nodes=tuple(nodes)), canonical(self._float).places
        constants = {p: v for p, v in self._replaced.items() if places[p].node.layer is None}
        return with_values(model, {p: places[p].layout.canonical(v) for p, v in constants.items()})


class SimulatedSession:
    """A session that is compiled again where the simulation was built again."""

    def __init__(self, simulation: KerasSimulation, taps: Sequence[Tap], feeds: Sequence[TensorId] | None) -> None:
        self._simulation, self._taps, self._feeds = simulation, taps, feeds
        self._generation, self._session = simulation.generation, simulation.opened(taps, feeds)

    def run(self, batch: Batch) -> Mapping[Tap, NDArray[Any]]:
        """As `KerasSession.run`."""
        if self._generation != self._simulation.generation:
            self._generation = self._simulation.generation
            self._session = self._simulation.opened(self._taps, self._feeds)
        return self._session.run(batch)
