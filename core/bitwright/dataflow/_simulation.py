"""Fake quantization of a dataflow model: two tables that sessions read when they run, so nothing is built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import SimulationBase, Tap, checked_params
from bitwright.dataflow._model import M
from bitwright.dataflow._session import FlowSession, Runner
from bitwright.graph import ParamId, TensorId
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Plan, SiteId


class FlowSimulation(SimulationBase, Generic[M]):
    """`Simulation` and `ParamUpdates`.

    Parameters are rounded in numpy, by `Encoding.fake_quantize`, whatever their grid; activations in the program.

    Attributes:
        model: the simulated model; what it computes follows `set` and `set_params`.
    """

    def __init__(self, backend: Runner, model: M, plan: Plan, encodings: EncodingTable) -> None:
        super().__init__(model.graph, plan, encodings)
        self.backend, self.plan = backend, plan
        self._rounded = {*self._sites.rounded, *self._sites.parameters}
        self._roots: dict[SiteId, Encoding] = {}
        self._in_force: dict[SiteId, Encoding] = {}  # where an op is needed
        self._params = dict(model.params)
        self.model: M = replace(model, params=self._params, encodings=self._in_force)
        self.set({s: e for s, e in encodings.items() if s in plan})

    def install(self, changes: Mapping[SiteId, Encoding | None]) -> None:
        """See `SimulationBase`."""
        for root, encoding in changes.items():
            ties = [s for s in self.plan.tied(root) if s in self._rounded]
            if encoding is None:
                self._roots.pop(root, None)
                for site in ties:
                    self._in_force.pop(site, None)
            else:
                self._roots[root] = encoding
                self._in_force.update(dict.fromkeys(ties, encoding))

    def in_force(self) -> Mapping[SiteId, Encoding]:
        """See `SimulationBase`."""
        return self._roots

    def set_params(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """See `ParamUpdates`."""
        shapes = {p: param.shape for p, param in self.model.graph.params.items()}
        self._params.update({p: np.array(v, np.float32) for p, v in checked_params(shapes, values).items()})

    def open(self, taps: Sequence[Tap], feeds: tuple[TensorId, ...] | None) -> FlowSession:
        """See `SimulationBase`."""
        return FlowSession(self.backend, self.model, taps, feeds)
