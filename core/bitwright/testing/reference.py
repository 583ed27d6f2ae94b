"""A complete backend in plain numpy: the worked example for adapters, and the model that everything is tested on.

Its native model is the canonical graph itself with the parameter values, so nothing needs translating; an adapter
for a framework differs in that `graph` and `read` convert names and layouts at its door.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import (
    Batch,
    Bundle,
    Editor,
    Sites,
    Tap,
    between,
    feed,
    not_computable,
    reduced,
    require_params,
    require_tensors,
)
from bitwright.errors import InputError, ModelError
from bitwright.graph import ACTIVATION_TYPES, Edit, Formula, Graph, Op, OpId, Param, ParamId, ParamRole, TensorId
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Plan, SiteId
from bitwright.testing import archive
from bitwright.testing.kernels import compute, supports

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class ReferenceModel:
    """A graph with its numbers.

    Attributes:
        graph: the canonical graph.
        params: values in canonical layout.
        perms: permutations of the transposes, which the canonical graph doesn't carry.
        encodings: fake quantization in force, by site; empty for a float model.
    """

    graph: Graph
    params: Mapping[ParamId, Array]
    perms: Mapping[OpId, tuple[int, ...]] = field(default_factory=dict)
    encodings: Mapping[SiteId, Encoding] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> dict[TensorId, Array]:
        """Run the model: outputs by name."""
        taps = [Tap(t) for t in self.graph.outputs]
        return {t.tensor: v for t, v in ReferenceSession(self, taps).run(batch).items()}


class ReferenceSession:
    """The ops between feeds and taps, in order, with the point after which each tensor may be dropped.

    Without `feeds` it is the whole model, fed by its inputs, which have sites of their own; the feeds of a segment
    are taken as they are given.
    """

    def __init__(self, model: ReferenceModel, taps: Sequence[Tap], feeds: Sequence[TensorId] | None = None) -> None:
        self.model, self.taps, self.whole = model, tuple(taps), feeds is None
        self.feeds = model.graph.inputs if feeds is None else tuple(feeds)
        wanted = [t.tensor for t in taps]
        require_tensors((*wanted, *self.feeds), model.graph.tensors)
        self.ops, missing = between(model.graph.ops, lambda o: o.data_inputs, lambda o: o.outputs, wanted, self.feeds)
        if missing:
            raise not_computable(wanted, self.feeds, missing)
        for op in self.ops:
            if not supports(op):
                raise ModelError(f"the reference backend can't run {op.id!r} ({op.native or op.type})")
        read = {*wanted, *(t for op in self.ops for t in op.data_inputs)}
        self.feeds = tuple(t for t in self.feeds if t in read)
        self._last_use = {t: i for i, op in enumerate(self.ops) for t in op.data_inputs}

    def run(self, batch: Batch) -> Mapping[Tap, Array]:
        """Feed and interpret.

        Raises:
            InputError: a feed is missing, or doesn't fit.
        """
        model, known = self.model, self.model.graph.tensors
        values = {t: feed(batch, t, known[t].dtype, known[t].shape) for t in self.feeds}
        if self.whole:
            values = {t: self._quantized(t, v) for t, v in values.items()}
        keep = {t.tensor for t in self.taps}
        for i, op in enumerate(self.ops):
            inputs = tuple(values[t] for t in op.data_inputs)
            params = {role: self._quantized(p, model.params[p]) for role, p in op.params.items()}
            outputs = compute(op, model.graph, inputs, params, model.perms.get(op.id, ()))
            for t, y in zip(op.outputs, outputs, strict=True):
                values.setdefault(t, self._quantized(t, y))
            for t in op.data_inputs:
                if self._last_use[t] == i and t not in keep:
                    values.pop(t, None)
        return {tap: reduced(values[tap.tensor], tap) for tap in self.taps}

    def _quantized(self, site: SiteId, value: Array) -> Array:
        encoding = self.model.encodings.get(site)
        return value if encoding is None else encoding.fake_quantize(value)


class ReferenceSimulation:
    """Fake quantization by site. The model reads the live table, so `set` rebuilds nothing."""

    def __init__(self, model: ReferenceModel, plan: Plan, encodings: EncodingTable) -> None:
        self.plan, self._sites = plan, Sites(model.graph, plan, encodings)
        self._in_force: dict[SiteId, Encoding] = {}  # every site that quantizes, ties included
        self.model = replace(model, encodings=self._in_force)
        self.set({s: e for s, e in encodings.items() if s in plan})

    def set(self, encodings: Mapping[SiteId, Encoding | None]) -> None:
        """Install or bypass; a site that shares its encoding stands for all that share it.

        Raises:
            EncodingError: a site isn't in the plan or stays in float, or an encoding doesn't fit its parameter.
        """
        for root, encoding in self._sites.changes(encodings).items():
            for tied in self.plan.tied(root):
                if encoding is None:
                    self._in_force.pop(tied, None)
                else:
                    self._in_force[tied] = encoding

    def get(self) -> EncodingTable:
        """The encodings in force, at roots and at the sites that share with them."""
        return self._sites.table(self._in_force)

    def session(self, taps: Sequence[Tap]) -> ReferenceSession:
        """Run the simulated network."""
        return ReferenceSession(self.model, taps)

    def segment(self, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> ReferenceSession:
        """Run a part of it."""
        return ReferenceSession(self.model, taps, feeds)


class ReferenceBackend:
    """Backend + PartialExecution for `ReferenceModel`."""

    name = "reference"

    def owns(self, model: object) -> bool:
        """Whether it is a `ReferenceModel`."""
        return isinstance(model, ReferenceModel)

    def load(self, path: Path, **options: Any) -> ReferenceModel:
        """Open a file that `save` or `export` wrote."""
        return ReferenceModel(*archive.read(path))

    def save(self, model: ReferenceModel, path: Path) -> Path:
        """Write one .npz, atomically."""
        return archive.write(path, model.graph, model.params, model.perms, model.encodings)

    def adopt(self, model: object, sample: Batch | None = None) -> ReferenceModel:
        """Models come as they are."""
        if not isinstance(model, ReferenceModel):
            raise ModelError(f"the reference backend takes a ReferenceModel, got {type(model).__name__}")
        return model

    def graph(self, model: ReferenceModel) -> Graph:
        """The canonical graph."""
        return model.graph

    def read(self, model: ReferenceModel, ids: Collection[ParamId]) -> Mapping[ParamId, NDArray[np.float32]]:
        """Copies of parameter values."""
        require_params(model.params, ids)
        return {i: np.array(model.params[i], np.float32) for i in ids}

    def edit(self, model: ReferenceModel, edits: Sequence[Edit]) -> ReferenceModel:
        """Apply edits, in order, to a copy."""
        editor = ReferenceEditor(model)
        editor.apply_all(edits)
        return editor.model

    def session(self, model: ReferenceModel, taps: Sequence[Tap]) -> ReferenceSession:
        """The whole model."""
        return ReferenceSession(model, taps)

    def segment(self, model: ReferenceModel, feeds: Sequence[TensorId], taps: Sequence[Tap]) -> ReferenceSession:
        """A part of it."""
        return ReferenceSession(model, taps, feeds)

    def simulate(self, model: ReferenceModel, plan: Plan, encodings: EncodingTable) -> ReferenceSimulation:
        """Fake quantization at the plan's sites."""
        return ReferenceSimulation(model, plan, encodings)

    def export(self, model: ReferenceModel, plan: Plan, encodings: EncodingTable, path: Path, format: str) -> Bundle:
        """Write the float model ("npz") or the model with its encodings ("npz-quantized")."""
        if format not in self.formats():
            raise InputError(f"unknown export format {format!r}; known: {', '.join(self.formats())}")
        if format == "npz-quantized":
            model = self.simulate(model, plan, encodings).model
        purpose = "model" if format == "npz" else "qdq"
        return Bundle({purpose: self.save(model, path)})

    def formats(self) -> Mapping[str, str]:
        """The float artefact first."""
        return {"npz": "float graph and parameters", "npz-quantized": "the same with fake quantization in force"}

    def input_specs(self, model: ReferenceModel) -> Mapping[TensorId, tuple[tuple[int | None, ...], str]]:
        """Shapes and dtypes of the inputs."""
        tensors = (model.graph.tensors[t] for t in model.graph.inputs)
        return {t.id: (t.shape or (None,), t.dtype) for t in tensors}


def rebuild(
    model: ReferenceModel,
    ops: Sequence[Op],
    params: Mapping[ParamId, Array] | None = None,
    outputs: Sequence[TensorId] | None = None,
) -> ReferenceModel:
    """The model with other ops; tensors and parameters that nothing uses any more are dropped."""
    values = model.params if params is None else params
    used = {p for op in ops for p in op.params.values()}
    old = model.graph
    outputs = old.outputs if outputs is None else outputs
    live = {*old.inputs, *outputs, *(t for op in ops for t in (*op.data_inputs, *op.outputs))}
    graph = Graph(
        ops,
        {t: tensor for t, tensor in old.tensors.items() if t in live},
        {p: old.params.get(p) or Param(p, values[p].shape) for p in values if p in used},
        old.inputs,
        outputs,
    )
    return replace(model, graph=graph, params={p: v for p, v in values.items() if p in used})


class ReferenceEditor(Editor):
    """Edits by rebuilding the graph; what is edited is `model`, what was given stays."""

    def __init__(self, model: ReferenceModel) -> None:
        super().__init__(model.graph)
        self.model = model

    def set_values(self, values: Mapping[ParamId, Array]) -> None:
        """See `Editor`."""
        known = self.model.params
        for p, value in values.items():
            if p not in known:
                raise ModelError(f"the model has no parameter {p!r}")
            if np.shape(value) != known[p].shape:
                raise ModelError(f"parameter {p!r} has shape {known[p].shape}, can't set it to {np.shape(value)}")
        self.model = replace(self.model, params={**known, **{p: np.array(v, np.float32) for p, v in values.items()}})

    def add_bias(self, op: Op, value: Array) -> ParamId:
        """See `Editor`."""
        bias = f"{op.id}.bias"
        if bias in self.model.params:
            raise ModelError(f"can't add a bias to {op.id!r}: parameter {bias!r} exists and belongs to another op")
        return self._give(op, bias, np.array(value, np.float32), ParamRole.BIAS)

    def split(self, op: Op, param: ParamId) -> ParamId:
        """See `Editor`."""
        roles = [role for role, held in op.params.items() if held == param]
        return self._give(op, f"{param}@{op.id}", self.model.params[param], *roles)

    def fold_backward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        self._without(norm, replace(into, outputs=norm.outputs))

    def fold_forward(self, norm: Op, into: Op) -> None:
        """See `Editor`."""
        self._without(norm, _reading(into, norm.output, norm.data_inputs[0]))

    def put_activation(self, op: Op, formula: Formula) -> None:
        """See `Editor`."""
        shown = ACTIVATION_TYPES[formula.type]
        changed = replace(op, kind=shown.kind, type=shown.type, attrs=shown.attrs, inputs=op.data_inputs, params={})
        self.model = rebuild(self.model, self._swapped(changed))

    def drop(self, op: Op, *, renames: bool) -> None:
        """See `Editor`."""
        source, gone = op.data_inputs[0], op.output
        ops = [o for o in self.model.graph.ops if o.id != op.id]
        if renames:
            ops = [
                replace(_reading(o, source, gone), outputs=tuple(gone if t == source else t for t in o.outputs))
                for o in ops
            ]
        else:
            ops = [_reading(o, gone, source) for o in ops]
        self.model = rebuild(self.model, ops)

    def _swapped(self, changed: Op) -> list[Op]:
        return [changed if op.id == changed.id else op for op in self.model.graph.ops]

    def _give(self, op: Op, param: ParamId, value: Array, *roles: ParamRole) -> ParamId:
        changed = replace(op, params={**op.params, **dict.fromkeys(roles, param)})
        self.model = rebuild(self.model, self._swapped(changed), {**self.model.params, param: value})
        return param

    def _without(self, gone: Op, changed: Op) -> None:
        self.model = rebuild(self.model, [op for op in self._swapped(changed) if op.id != gone.id])


def _reading(op: Op, old: TensorId, new: TensorId) -> Op:
    return replace(op, inputs=tuple(new if t == old else t for t in op.inputs))
