"""What both walks go over, how their networks are run from cut to cut, and what becomes of what is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Batch, PartialExecution, Session, Simulation, Tap
from bitwright.data import CACHE_BYTES, CutCache, Dataset
from bitwright.files import Spill
from bitwright.graph import Graph, OpId, TensorId
from bitwright.grids import EncodingTable
from bitwright.layerwise._solving import dump, load
from bitwright.placement import Plan, SiteKind
from bitwright.progress import Progress, Store
from bitwright.technique import LayerResult

Cut = tuple[TensorId, ...]


@dataclass
class Walk:
    """A float network, the quantized one that it becomes, and the data that both see.

    Attributes:
        encodings: current ones; weights that aren't visited stay quantized by these.
        activations: gives the activation encodings when they are first needed.
        store: finished ops are kept here under "<unit>/<op id>".
        cache_bytes: of tensors at a cut, kept in memory.
        name: what messages begin with.
    """

    unit = "op"

    backend: Backend[Any]
    model: object
    graph: Graph
    plan: Plan
    encodings: EncodingTable
    data: Dataset
    store: Store
    progress: Progress
    activations: Callable[[], EncodingTable] | None = None
    cache_bytes: int = CACHE_BYTES
    name: str = "walk"

    def with_activations(self) -> EncodingTable:
        """The encodings, those of activations among them."""
        return self.encodings if self.activations is None else self.activations()

    def bypass_activations(self, simulation: Simulation[Any]) -> None:
        """Leave all activations of a simulation in float."""
        simulation.set({s: None for s, site in self.plan.items() if site.kind is SiteKind.ACTIVATION})

    def float_session(self, cut: Cut | None, wanted: Cut) -> Session | None:
        """What computes tensors of the float network from those at a cut.

        Args:
            cut: None for the model's inputs.
            wanted: to be computed.

        Returns:
            None where all of them are fed.
        """
        fed = self.graph.inputs if cut is None else self._behind(cut)
        taps = [Tap(t) for t in wanted if t not in fed]
        if not taps:
            return None
        if cut is None:
            return self.backend.session(self.model, taps)
        assert isinstance(self.backend, PartialExecution)
        return self.backend.segment(self.model, fed, taps)

    def quantized_session(
        self, simulation: Callable[[], Simulation[Any]], cut: Cut | None, wanted: Cut
    ) -> Session | None:
        """As `float_session`, in the quantized network, which isn't asked for where all is fed.

        A model input is quantized at its own site, so that it passes through the session even when it is wanted.
        """
        fed = () if cut is None else self._behind(cut)
        taps = [Tap(t) for t in wanted if t not in fed]
        if not taps:
            return None
        return simulation().session(taps) if cut is None else simulation().segment(fed, taps)

    def batches(self, cache: CutCache | None) -> Iterator[Batch]:
        """The data, with what was kept of them at a cut.

        Shapes are often computed from the model's inputs, which therefore stay at hand behind every cut.
        """
        if cache is None:
            return iter(self.data)
        return ({**inputs, **held} for inputs, held in zip(self.data, cache, strict=True))

    def _behind(self, cut: Cut) -> Cut:
        return tuple(dict.fromkeys((*cut, *self.graph.inputs)))


def through(session: Session | None, batch: Batch, wanted: Cut) -> dict[TensorId, NDArray[Any]]:
    """What a session makes of a batch, and what the batch holds already of the tensors that are wanted."""
    made = {} if session is None else {tap.tensor: v for tap, v in session.run(batch).items()}
    return {t: made[t] if t in made else np.asarray(batch[t]) for t in wanted}


class Finished:
    """Results of a walk's ops: in its store, for runs to come, and here, where all weights but a few lie on disk."""

    def __init__(self, walk: Walk) -> None:
        self._store, self._unit, self._spill = walk.store, walk.unit, Spill()

    def of(self, ops: Iterable[OpId]) -> Mapping[OpId, LayerResult]:
        """Those that an earlier run has finished."""
        return {o: self._held(r) for o in ops if (r := load(self._store.get(f"{self._unit}/{o}"))) is not None}

    def keep(self, op: OpId, result: LayerResult) -> LayerResult:
        """Store a result; what is returned is to be held on to."""
        result = self._held(result)
        self._store.put(f"{self._unit}/{op}", dump(result))
        return result

    def _held(self, result: LayerResult) -> LayerResult:
        return replace(result, weight=self._spill.kept(result.weight))
