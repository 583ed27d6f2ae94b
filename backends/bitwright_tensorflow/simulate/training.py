"""Quantization-aware training and range learning: a simulation whose parameters are variables of the graph.

The user's own loss, optimizer and loop train `model`'s variables, in its session or through its function. See
`trained_sites` for how grids behave.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bitwright.backend import Training
from bitwright.errors import EncodingError
from bitwright.graph import ParamId
from bitwright.grids import Encoding
from bitwright.placement import Plan, SiteId
from bitwright_tensorflow.graph.model import Array, TfModel
from bitwright_tensorflow.simulate.building import Builder, SimulatedNetwork
from bitwright_tensorflow.simulate.simulation import TfSimulation


class TrainableTfSimulation(TfSimulation):
    """`bitwright.backend.TrainableSimulation`: parameters are quantized in the graph, from variables to train."""

    def __init__(
        self, model: TfModel, plan: Plan, encodings: Mapping[SiteId, Encoding | None], training: Training
    ) -> None:
        self._training = training
        super().__init__(model, plan, encodings)

    def _start(self, encodings: Mapping[SiteId, Encoding | None]) -> None:
        changes = self._sites.changes(encodings)
        self._chains = {}
        self._table = {r: e for r, e in changes.items() if e is not None}
        self._network = self._build()

    def _build(self) -> SimulatedNetwork:
        builder = Builder(self._float, self._found, self._sites)
        network = builder.for_training(self._table, self._training)
        self.revision += 1
        self.values = {**self._float.values, **{c: self._native(c) for c in network.constants}}
        self._network, self._user = network, None
        for root, site in network.sites.items():
            self.values.update(site.install(self._table[root]))
        bases = {root: site.base for root, site in network.sites.items() if site.base is not None}
        if bases:
            # The graph's own arithmetic tells the ratio to the min-max grid, so that the start is exact.
            for (root, _), base in zip(bases.items(), self.model.fetch([str(b) for b in bases.values()]), strict=True):
                self.values.update(network.sites[root].ratios(base))
            self.model.assign({n: v for n, v in self.values.items() if n.endswith("/ratio")})
        return network

    def install(self, changes: Mapping[SiteId, Encoding | None]) -> None:
        """See `SimulationBase`; learned numbers start again from the encodings.

        Raises:
            EncodingError: the graph, to which an optimizer may belong already, can't hold an encoding: for a site that
                had none, or another kind of grid than it had.
        """
        sites = self._network.sites
        changes = {r: e for r, e in changes.items() if r in sites or e is not None}
        for root, encoding in changes.items():
            if root not in sites or not sites[root].takes(encoding):
                raise EncodingError(
                    f"{root!r} can't take this encoding while training: its graph is built for the kind of grid that "
                    "it started with; make a new trainable simulation with the encoding"
                )
        changed: dict[str, Array] = {}
        for root, encoding in changes.items():
            changed |= sites[root].install(encoding)
        self.model.assign(changed)
        ratios: dict[str, Array] = {}
        followers = [(sites[r], b) for r, e in changes.items() if e is not None and (b := sites[r].base) is not None]
        if followers:
            for (site, _), base in zip(followers, self.model.fetch([b for _, b in followers]), strict=True):
                ratios |= site.ratios(base)
            self.model.assign(ratios)
        self.values.update({**changed, **ratios})

    def set_params(self, values: Mapping[ParamId, NDArray[np.floating]]) -> None:
        """As `TfSimulation.set_params`; grids stay, to be trained on from the new values."""
        kept = self.grids_of(values)
        super().set_params(values)
        self.install(kept)

    def in_force(self) -> Mapping[SiteId, Encoding]:
        """See `SimulationBase`; grids that follow weights as they are now, too."""
        sites = self._network.sites
        on = self.model.read([f"{s.prefix}/on" for s in sites.values()])
        numbers = iter(self.model.fetch([t for s in sites.values() for t in s.now]))
        by_root = {}
        for root, site in sites.items():
            encoding = site.present(bool(on[f"{site.prefix}/on"]), next(numbers), next(numbers))
            if encoding is not None:
                by_root[root] = encoding
        return by_root

    def refresh(self) -> None:
        """Take over what training has made of the variables."""
        if self._user is None:
            return
        for name, value in self._user.read(list(self.values)).items():
            if not np.array_equal(self.values[name], value):
                self.values[name] = value

    def float_model(self) -> TfModel:
        """A new float model with the variables' present values."""
        constants = self._network.constants
        present = self.model.read([*self._float.values, *constants])
        model = self._float.with_values({n: v for n, v in present.items() if n in self._float.values})
        if not constants:
            return model
        meta = model.copy_meta()
        for node in meta.graph_def.node:
            if node.name in constants:
                node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(present[node.name]))
        return model.with_meta(meta)
