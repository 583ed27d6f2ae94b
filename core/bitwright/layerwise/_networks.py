"""The float and the quantized network of a layer-by-layer walk, advancing together from cut to cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import ParamUpdates, Simulation
from bitwright.data import CutCache, close_all
from bitwright.graph import (
    Edit,
    Op,
    OpId,
    ParamId,
    ParamRole,
    SetBias,
    SetParams,
    SplitSharedParam,
    TensorId,
    output_channels,
)
from bitwright.grids import Encoding, EncodingTable
from bitwright.layerwise._base import Walk, through
from bitwright.layerwise._cuts import Visit
from bitwright.placement import SiteId
from bitwright.statistics import LayerMoments
from bitwright.technique import LayerResult


class Networks:
    """The float and the quantized network, advancing from cut to cut.

    Args:
        walk: whose networks they are.
        encodings: in force at the start.
        ops: that the walk visits.
        quantized: run the quantized network too.
        activations: and quantize its activations, not just its weights.
    """

    def __init__(
        self, walk: Walk, encodings: EncodingTable, ops: Sequence[Op], *, quantized: bool, activations: bool
    ) -> None:
        self.walk, self.graph = walk, walk.graph
        self.ops, self.quantized, self.activations = ops, quantized, activations
        self.encodings = encodings
        self.simulation: Simulation[Any] | None = None
        self.users = {p: len(self.graph.users(p)) for p in self.graph.params}
        # A shared bias is nobody's own: it is split off when one of its ops gets another.
        self.biases = {op.id: b if self.users.get(b := op.params.get(ParamRole.BIAS, "")) == 1 else None for op in ops}
        # What is replaced waits twice: for the edited model, which is made again only where the simulation can't be
        # changed in place, and for that simulation.
        self.edited: object = walk.model
        self.changed: dict[ParamId, NDArray[np.float32]] = {}
        """What `edited` doesn't have yet."""
        self.added: dict[OpId, NDArray[np.float32]] = {}
        """Biases of ops that have none of their own yet."""
        self.params: dict[ParamId, NDArray[np.float32]] = {}
        """What the simulation doesn't have yet."""
        self.installed: dict[SiteId, Encoding] = {}
        self.caches: list[CutCache | None] = [None, None]

    def replace(self, op: Op, result: LayerResult) -> None:
        """Put a finished layer into the quantized network, so that the next ones see its error."""
        assert op.weight is not None
        self.encodings = self.encodings.merged({op.weight: result.encoding})
        self.installed[op.weight] = result.encoding
        self.params[op.weight] = result.weight
        bias = self.biases[op.id]
        if result.bias is not None and bias is None:
            self.added[op.id] = result.bias
        elif result.bias is not None and bias is not None:
            self.params[bias] = result.bias

    def run(self, visit: Visit, moments: LayerMoments | None, addend: TensorId | None = None) -> None:
        """Stream the layer's inputs into `moments`, and move the cut if the visit says so."""
        needed = [t for t in (visit.op.data_inputs[0], addend) if t is not None]
        wanted = visit.cut if visit.moves else tuple(dict.fromkeys(needed))
        cut = None if visit.start == self.graph.inputs else visit.start
        sessions = [self.walk.float_session(cut, wanted)]
        if self.quantized:
            sessions.append(self.walk.quantized_session(self._simulation, cut, wanted))
        fresh = [CutCache(self.walk.cache_bytes // 2) for _ in sessions]
        try:
            held = (self.walk.batches(cache) for cache in self.caches[: len(sessions)])
            for batches in zip(*held, strict=True):
                seen: list[dict[TensorId, NDArray[Any]]] = []
                for index, (session, batch) in enumerate(zip(sessions, batches, strict=True)):
                    values = through(session, batch, wanted)
                    if visit.moves:
                        fresh[index].append(values)
                    seen.append(values)
                if moments is not None:
                    moments.update(*(v[needed[0]] for v in seen), *(seen[0][t] - seen[1][t] for t in needed[1:]))
        except BaseException:
            close_all(fresh)
            raise
        if visit.moves:
            self.close()
            self.caches = [*fresh, None][:2]

    def _simulation(self) -> Simulation[Any]:
        """The quantized network with all that was replaced; lowered only once where its parameters can be changed."""
        self.changed.update(self.params)
        known = self.simulation
        if not isinstance(known, ParamUpdates) or self.added:
            known = self.simulation = self._lowered(known)
        else:
            known.set_params(self.params)
            known.set(self.installed)
        self.params, self.installed = {}, {}
        return known

    def _lowered(self, known: Simulation[Any] | None) -> Simulation[Any]:
        if isinstance(known, ParamUpdates):
            # One layer gets a bias that it didn't have, so others will: with zeros for now, so that this is done once.
            for op in self.ops:
                shape = self.graph.params[op.weight or ""].shape
                if ParamRole.BIAS not in op.params and self.biases[op.id] is None and op.id not in self.added:
                    self.added[op.id] = np.zeros(output_channels(op, shape), np.float32)
        edits: list[Edit] = [SetParams(self.changed)] if self.changed else []
        for id, bias in self.added.items():
            shared = self.graph.op(id).params.get(ParamRole.BIAS)
            if shared is not None and self.users[shared] > 1:
                edits.append(SplitSharedParam(id, shared))
                self.users[shared] -= 1
            edits.append(SetBias(id, bias))
        if edits:
            self.edited = self.walk.backend.edit(self.edited, edits)
        if self.added:
            graph = self.walk.backend.graph(self.edited)
            self.biases.update((o, graph.op(o).params.get(ParamRole.BIAS)) for o in self.added if o in graph)
        self.changed, self.added = {}, {}
        simulation = self.walk.backend.simulate(self.edited, self.walk.plan, self.encodings)
        if not self.activations:
            self.walk.bypass_activations(simulation)
        return simulation

    def close(self) -> None:
        """Let what is kept at the cut go."""
        caches, self.caches = self.caches, [None, None]
        close_all(cache for cache in caches if cache is not None)
