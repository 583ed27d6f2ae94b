"""A simulation for ONNX: the float model with chains of standard ops at its sites, run by ONNX Runtime.

What a change costs:

- A session is compiled for the encodings that it begins with: their numbers are constants, sites of up to 8 bits and
  full ones of 16 a bare pair of QuantizeLinear and DequantizeLinear. Once encodings have changed before it ran
  `LASTING` batches, it is built with numbers as graph inputs and bypasses as fed switches; from then on a change of
  activation encodings (scale, zero point, integer widths up to 8, None, back again) costs nothing, and a batch a
  fourth more. When encodings have stayed for `LASTING` batches, they are constants again.
- An activation that leaves the kinds of grid seen so far (its first width above 8 bits, its first float format or
  32-bit grid, its first change between one scale and many): the session is built again at its next run, once.
- Parameter encodings: parameters are quantized in numpy and enter as constants (as inputs they would cost ONNX
  Runtime's blocked convolution layout, 2.6 × the time of the float model); a session that holds a changed parameter
  is built again at its next run, 0.1 s for EfficientNet-Lite0. One way of lowering also means that equal encodings
  give bit-equal results, whatever came before.
- A session that has run for a while is built once more, with sites in the layout of ONNX Runtime's convolutions
  (`session.BLOCKED_AFTER`, `blocked`): 0.1 s for MobileNetV2, whose batches of 8 images take a third less from then on.

Sites that share an encoding have no op where the values lie on the grid already (reshape, max pooling, concat, … of
tensors on the same grid). Biases whose encoding is derived stay in float unless an encoding is set for them
(`bitwright.calibration.full_table` holds one for each); with it a simulation comes to the integer runtime's very codes
on shallow nets, without it a coarse weight grid (4 bits) moves some by a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.backend import Batch, SimulationBase, Tap, parts_of, require_tensors
from bitwright.errors import InputError, ModelError
from bitwright.files import Array
from bitwright.graph import Graph, Param, ParamId, TensorId
from bitwright.grids import Encoding
from bitwright.placement import Plan, SiteId
from bitwright_onnx.graph.opset import raise_opset
from bitwright_onnx.graph.params import native_tensors
from bitwright_onnx.graph.subgraph import extract, values_of
from bitwright_onnx.graph.tensors import tensor_array
from bitwright_onnx.simulate.lowering import Lowering, fake_quantized
from bitwright_onnx.simulate.session import SIMULATION_CONFIG, OrtSession
from bitwright_onnx.simulate.site_ops import SiteForm, constants, form_of, numbers

LASTING = 8
"""Batches by which encodings that a session runs have lasted, so that they are worth a session of their own."""


@dataclass(frozen=True)
class Content:
    """What a part of the model has of the simulation: roots of sites whose grids are in it, and parameters."""

    roots: frozenset[SiteId]
    parameters: frozenset[ParamId]


@dataclass(frozen=True)
class Lowered:
    """A part of the model with its chains.

    Attributes:
        part: itself.
        aliases: the name of each site's quantized tensor where it isn't the site's own.
        live: inputs that carry the numbers of grids.
        content: of the part.
    """

    part: ir.Model
    aliases: Mapping[TensorId, str]
    live: tuple[str, ...]
    content: Content


class OnnxSimulation(SimulationBase):
    """`bitwright.backend.Simulation` of an ONNX model.

    Args:
        model: the float model; never changed.
        graph: its canonical graph.
        plan, encodings: see `SimulationBase`.

    Raises:
        EncodingError: an encoding is for an unknown or float site, or doesn't fit its tensor.
    """

    def __init__(self, model: ir.Model, graph: Graph, plan: Plan, encodings: Mapping[SiteId, Encoding | None]) -> None:
        super().__init__(graph, plan, encodings)
        self._float = model
        self.values = values_of(model.graph)
        self._table: dict[SiteId, Encoding] = {}
        self._rounded = tuple(s for s in self._sites.rounded if s in self.values)
        self._prefix = {s: self._free_name(f"{s}/quantizer") for s in {plan.root(s) for s in self._rounded}}
        self._forms: dict[SiteId, SiteForm] = {}
        self.bound: dict[str, Array] = {}
        self._quantized: dict[SiteId, tuple[Encoding, ir.TensorProtocol]] = {}
        self._replaced: dict[ParamId, tuple[int, ir.TensorProtocol]] = {}
        self.changes = 0
        """Grows with every encoding or value that is set."""
        for root in self._prefix:
            spec = plan.spec(root)
            self._install(root, None, SiteForm("integer8") if spec is None else form_of(spec, self._rank(root)))
        self.set(encodings)

    @property
    def model(self) -> SimulatedModel:
        """The simulated model, to be called with batches."""
        return SimulatedModel(self)

    def install(self, changes: Mapping[SiteId, Encoding | None]) -> None:
        """See `SimulationBase`."""
        self.changes += 1
        for root, encoding in changes.items():
            if encoding is None:
                self._table.pop(root, None)
            else:
                self._table[root] = encoding
            if root in self._prefix:
                self._install(root, encoding)

    def set_params(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """See `bitwright.backend.ParamUpdates`; sessions opened before are built again where they hold what changed."""
        replaced = native_tensors(self._float, values)
        self.changes += 1
        for id, tensor in replaced.items():
            self._replaced[id] = self.changes, tensor
            self._quantized.pop(id, None)

    def in_force(self) -> Mapping[SiteId, Encoding]:
        """See `SimulationBase`."""
        return self._table

    def open(self, taps: Sequence[Tap], feeds: tuple[TensorId, ...] | None) -> SimulatedSession:
        """See `SimulationBase`."""
        return SimulatedSession(self, feeds, taps)

    def to_model(self) -> onnx.ModelProto:
        """The simulated model as it is now, encodings and quantized parameters baked in as constants."""
        outputs = [str(v.name) for v in self._float.graph.outputs]
        return ir.to_proto(self.lower(outputs, None, fixed=True).part)

    def _rank(self, site: SiteId) -> int | None:
        shape = self.values[site].shape
        return None if shape is None else len(shape)

    def _free_name(self, name: str) -> str:
        while any(v.startswith(name) for v in self.values):
            name += "_"
        return name

    def _install(self, root: SiteId, encoding: Encoding | None, form: SiteForm | None = None) -> None:
        known = self._forms.get(root)
        if encoding is not None:
            form = form_of(encoding, self._rank(root))
        if known is not None and (form is None or known.covers(form)):
            form = known
        assert form is not None
        self._forms[root] = form
        prefix = self._prefix[root]
        for suffix, value in {**numbers(form, encoding), **constants(form)}.items():
            self.bound[f"{prefix}/{suffix}"] = value

    def lower(
        self,
        outputs: Sequence[TensorId],
        feeds: tuple[TensorId, ...] | None,
        *,
        fixed: bool = False,
        pairs: bool = False,
    ) -> Lowered:
        """The part between feeds and outputs with its chains.

        Args:
            fixed: their numbers are constants; without it, inputs that follow the encodings.
            pairs: those of chains that are no more than a pair are constants. What ONNX Runtime makes of the other ops
                depends on that as little as the bits of chains do: it looks through neither a switch nor a pair.
        """
        part = extract(self._float, list(dict.fromkeys(outputs)), feeds)
        values = values_of(part.graph)
        active = [s for s in self._rounded if s not in (feeds or ()) and s in values]
        forms = {s: self._forms[self._plan.root(s)] for s in active}
        wanted = max((f.opset for f in forms.values()), default=0)
        if part.graph.opset_imports.get("", 1) < wanted:
            part = raise_opset(part, wanted)
            values = values_of(part.graph)
        part.ir_version = max(part.ir_version, 10)
        for id, (_, tensor) in self._replaced.items():
            if id in values:
                values[id].const_value = tensor
        for shared, grid in self._table.items():
            for site in self._plan.tied(shared):
                if self._sites.is_parameter(site) and site in values:
                    self._set_parameter(values[site], self._graph.params[site], grid)
        lowering = Lowering(part)
        aliases: dict[TensorId, str] = {}
        for site in active:
            root = self._plan.root(site)
            encoding = self._table.get(root)
            if encoding is not None and (fixed or (pairs and lowering.is_pair(values[site], forms[site], encoding))):
                alias = lowering.fixed(values[site], forms[site], self._prefix[root], encoding)
            elif not fixed:
                alias = lowering.live(values[site], forms[site], self._prefix[root])
            else:
                continue
            if alias != site:
                aliases[site] = alias
        values = values_of(part.graph)
        roots = frozenset(self._plan.root(s) for s in self._rounded if s in values)
        parameters = frozenset(p for p in self._graph.params if p in values)
        return Lowered(part, aliases, tuple(lowering.live_inputs), Content(roots, parameters))

    def held_by(self, content: Content) -> tuple[dict[str, object], ...]:
        """What a part has of the simulation built in, as it is now: forms of grids, encodings of parameters, values.

        A session on the part is right for as long as this stays equal; what else changes reaches it by `bound`.
        """
        forms: dict[str, object] = {r: self._forms[r] for r in content.roots}
        encodings: dict[str, object] = {
            p: self._table.get(self._plan.root(p)) for p in content.parameters if p in self._plan
        }
        replaced: dict[str, object] = {p: r for p, (r, _) in self._replaced.items() if p in content.parameters}
        return forms, encodings, replaced

    def numbers_of(self, content: Content) -> dict[str, object]:
        """The encodings of a part's sites, as they are now."""
        return {r: self._table.get(r) for r in content.roots}

    @property
    def inputs(self) -> tuple[TensorId, ...]:
        """Of the model."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorId, ...]:
        """Of the model."""
        return tuple(str(v.name) for v in self._float.graph.outputs)

    def _set_parameter(self, value: ir.Value, param: Param, encoding: Encoding) -> None:
        known = self._quantized.get(param.id)
        if known is None or known[0] is not encoding:
            if value.const_value is None:
                raise ModelError(f"parameter {param.id!r} is not an initializer of the main graph")
            array = fake_quantized(tensor_array(value.const_value), param, encoding)
            known = (encoding, ir.Tensor(array, dtype=value.const_value.dtype, name=value.name))
            if self._whole:
                self._quantized[param.id] = known
        value.const_value = known[1]

    @cached_property
    def _whole(self) -> bool:
        """Whether rounded parameters are kept for the next session: not those of a network that is run in parts."""
        return len(parts_of(self._graph)) == 1


class SimulatedSession:
    """`bitwright.backend.Session` in a simulated network; follows the simulation's encodings from run to run."""

    def __init__(self, simulation: OnnxSimulation, feeds: tuple[TensorId, ...] | None, taps: Sequence[Tap]) -> None:
        self._simulation = simulation
        self._feeds = feeds
        self._taps = tuple(dict.fromkeys(taps))
        self._content: Content | None = None
        self._held: tuple[dict[str, object], ...] = ()
        self._numbers: dict[str, object] = {}
        self._constant = True
        """Whether numbers are constants where they can be."""
        self._runs = 0
        """Batches since the numbers changed."""
        self._ran = 0
        """Batches that the session has run."""
        self._changes = -1
        self._aliases: dict[Tap, Tap] = {}
        self._session: OrtSession | None = None
        require_tensors((*(t.tensor for t in self._taps), *(feeds or ())), simulation.values)

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """Feed one batch (model inputs, or the segment's feeds).

        Raises:
            InputError: a needed array is missing or doesn't fit.
        """
        results = self._compiled().run(batch)
        return {tap: results[self._aliases[tap]] for tap in self._taps}

    def _compiled(self) -> OrtSession:
        """The session for the simulation's present graph; built again only where it holds what has changed."""
        simulation = self._simulation
        session, content = self._session, self._content
        if session is None or content is None:
            session = self._made(constant=True)
        elif self._changes != simulation.changes:
            self._changes = simulation.changes
            held, numbers = simulation.held_by(content), simulation.numbers_of(content)
            brief = held != self._held and self._ran < LASTING
            if numbers != self._numbers:
                lasted, self._runs, self._numbers = self._runs >= LASTING, 0, numbers
                if self._constant or held != self._held:
                    session = self._made(constant=lasted, brief=brief)
            elif held != self._held:
                session = self._made(constant=self._constant, brief=brief)
        elif not self._constant and self._runs >= LASTING:
            session = self._made(constant=True)
        self._runs += 1
        self._ran += 1
        return session

    def _made(self, *, constant: bool, brief: bool = False) -> OrtSession:
        simulation = self._simulation
        lowered = simulation.lower([t.tensor for t in self._taps], self._feeds, pairs=constant)
        self._aliases = {t: replace(t, tensor=lowered.aliases.get(t.tensor, t.tensor)) for t in self._taps}
        self._content, self._held = lowered.content, simulation.held_by(lowered.content)
        self._numbers, self._constant = simulation.numbers_of(lowered.content), constant
        self._changes = simulation.changes
        self._session = OrtSession(
            lowered.part,
            list(self._aliases.values()),
            feeds=None if self._feeds is None else [*self._feeds, *lowered.live],
            bound=simulation.bound,
            config=SIMULATION_CONFIG,
            sites=bool(lowered.content.roots),
            blocked=True,
            brief=brief,
        )
        self._ran = 0
        return self._session


def by_name(batch: Batch | Array, inputs: Sequence[str]) -> Batch:
    """A batch by input name; an array alone is that of the one input.

    Raises:
        InputError: an array alone, and there are several inputs or none.
    """
    if isinstance(batch, Mapping):
        return batch
    if len(inputs) != 1:
        raise InputError(
            f"the model has the inputs {', '.join(map(repr, inputs)) or 'none'}: give a mapping with an array for each"
        )
    return {inputs[0]: np.asarray(batch)}


class SimulatedModel:
    """The simulated model, evaluated like a session: batches in, the model's outputs by name out.

    It follows later changes of the simulation's encodings.
    """

    def __init__(self, simulation: OnnxSimulation) -> None:
        self._simulation = simulation
        self.inputs: tuple[str, ...] = simulation.inputs
        self.outputs: tuple[str, ...] = simulation.outputs
        self._session = simulation.session([Tap(name) for name in self.outputs])

    def run(self, batch: Batch | Array) -> dict[str, Array]:
        """Outputs by name for one batch of model inputs; an output that is an input is handed out as it came.

        Args:
            batch: arrays by input name; of a model with one input the array alone will do.

        Raises:
            InputError: an array alone, and the model has several inputs; an array is missing or doesn't fit.
        """
        batch = by_name(batch, self.inputs)
        passed = {name: np.asarray(batch[name]) for name in self.outputs if name in self.inputs and name in batch}
        return {tap.tensor: passed.get(tap.tensor, array) for tap, array in self._session.run(batch).items()}

    __call__ = run

    def to_model(self) -> onnx.ModelProto:
        """A `ModelProto` of it with all encodings baked in, to be run anywhere (standard ops only)."""
        return self._simulation.to_model()
