"""What a simulation is: one frozen value. Every operation reads one and makes another, so a failure changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, ParamReader, TrainableSimulation, Training
from bitwright.calibration import full_table
from bitwright.data import (
    DataLike,
    Dataset,
    ImageOptions,
    InputSpecs,
    Samples,
    TextOptions,
    batch_dimension,
    is_forward_pass,
    open_data,
    recorded,
    require_ranks,
)
from bitwright.graph import Graph, OpId
from bitwright.grids import EncodingTable
from bitwright.placement import Plan
from bitwright.progress import Progress, Silent
from bitwright.runs import RunDirectory
from bitwright.targets import Target, is_preset
from bitwright.technique import Report, Reports
from bitwright.workers import Workers

Folded = Mapping[OpId, tuple[NDArray[np.floating], NDArray[np.floating]]]
"""(γ, β) of the batch norm that each linear op has absorbed, see `technique.Outcome`."""


@dataclass(frozen=True, eq=False)
class InTraining:
    """A model that is out for training.

    Attributes:
        simulation: has its weights and grids.
        settings: how the grids are trained.
        native, plan: the float model that the training began from, or that was last taken from it, and its plan.
        taken: fingerprint of its weights and grids then.
    """

    simulation: TrainableSimulation
    settings: Training
    native: object
    plan: Plan
    taken: str


@dataclass(frozen=True, eq=False)
class Rounded:
    """A float model whose weights were rounded on a bank's statistics.

    Attributes:
        native: the model.
        network: fingerprint of the network that its weights were rounded from, which the bank was collected on.
    """

    native: object
    network: str


@dataclass(frozen=True, eq=False, kw_only=True)
class SimState:
    """All that a simulation is. `graph` and `plan` follow from the other fields: `rebuilt` keeps them so.

    Mappings are copied and can't be written to; models are never changed by backends.

    Attributes:
        backend, native: the float model in its present form, and what runs it.
        graph: of `native`.
        target, weights, activations, kv_cache, scheme, weight_scheme, overrides: how it is to be quantized, as
            `QuantSim` takes them; overrides for what a technique has removed are gone.
        plan: what follows from these for `graph`.
        encodings: set so far, by site; not those that are shared or derived.
        folded: what batch-norm folding left behind.
        reports: of the techniques applied, in order, by name.
        changed_by: what has changed the float model since it was opened, each once, in order: techniques, "training".
        reference: the first samples of the calibration data, which an export is proven on.
        training: a model of `QuantSim.trainable`, if there is one.
        rounded: says that `native` was rounded on a bank, which still serves it then; of another model it says nothing.
        seed: of everything random.
        source: the file that the model was opened from.
        run: where long steps keep finished work; None keeps it in memory.
        progress: where progress is shown.
        workers: where layers are solved; None solves them here.
    """

    backend: Backend[Any]
    native: Any
    graph: Graph
    target: Target
    plan: Plan
    weights: str | None = None
    activations: str | None = None
    scheme: str = "sqnr"
    weight_scheme: str = "minmax"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    kv_cache: str | None = None
    encodings: EncodingTable = field(default_factory=EncodingTable)
    folded: Folded = field(default_factory=dict)
    reports: tuple[tuple[str, Report], ...] = ()
    changed_by: tuple[str, ...] = ()
    reference: Samples | None = None
    training: InTraining | None = None
    rounded: Rounded | None = None
    seed: int = 0
    source: Path | None = None
    run: RunDirectory | None = None
    progress: Progress = field(default_factory=Silent)
    workers: Workers | None = None

    def __post_init__(self) -> None:
        overrides = {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.overrides.items()}
        object.__setattr__(self, "overrides", MappingProxyType(overrides))
        object.__setattr__(self, "folded", MappingProxyType(dict(self.folded)))
        object.__setattr__(self, "reports", tuple(self.reports))
        object.__setattr__(self, "changed_by", tuple(dict.fromkeys(self.changed_by)))

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `QuantSim` that a saved state needs to be opened again, JSON-like."""
        # What a plugin brings may be gone when the state is opened again: only presets go by their names.
        preset = is_preset(self.target)
        return {
            "target": self.target.name if preset else self.target.config.model_dump(mode="json", exclude_none=True),
            "weights": self.weights,
            "activations": self.activations,
            "scheme": self.scheme,
            "weight_scheme": self.weight_scheme,
            "overrides": dict(self.overrides),
            "seed": self.seed,
            **({} if self.kv_cache is None else {"kv_cache": self.kv_cache}),
        }

    @property
    def params(self) -> ParamReader:
        """The current float parameters, in canonical layout."""
        return ParamReader(self.backend, self.native, self.graph)

    @property
    def inputs(self) -> InputSpecs:
        """Shape and dtype of each model input."""
        return self.backend.input_specs(self.native)

    @property
    def table(self) -> EncodingTable:
        """One encoding for every quantized site: shared ones resolved, biases derived.

        Raises:
            EncodingError: the simulation isn't calibrated yet.
        """
        return full_table(self.plan, self.encodings)

    def open(
        self,
        data: DataLike,
        *,
        batch_size: int = 8,
        limit: int | None = None,
        text: TextOptions | None = None,
        images: ImageOptions | None = None,
    ) -> Dataset:
        """See `QuantSim.open`."""
        if isinstance(data, Dataset):
            return data
        require_ranks(self.graph, self.inputs)
        if is_forward_pass(data):
            data = recorded(self.backend, self.native, data)
        text = text or TextOptions.beside(self.source)
        return open_data(data, self.inputs, batch_size=batch_size, limit=limit, images=images, text=text)

    def computes_as(self, other: SimState) -> bool:
        """Whether a simulation of the other serves for this one: it has the very same model, plan and encodings."""
        return (
            self.native is other.native
            and self.plan is other.plan
            and self.encodings is other.encodings
            and self.backend is other.backend
        )


class StateView:
    """The fields of a state under their own names, to be read."""

    _state: SimState

    @property
    def state(self) -> SimState:
        """All that the simulation is, in one frozen value."""
        return self._state

    @property
    def backend(self) -> Backend[Any]:
        """What runs the model."""
        return self._state.backend

    @property
    def native(self) -> Any:
        """The float model in its present form, as the backend holds it."""
        return self._state.native

    @property
    def graph(self) -> Graph:
        """The model's canonical graph."""
        return self._state.graph

    @property
    def target(self) -> Target:
        """What the model is quantized for."""
        return self._state.target

    @property
    def weights(self) -> str | None:
        """The type of weights that was asked for; None is the target's."""
        return self._state.weights

    @property
    def activations(self) -> str | None:
        """The type of activations that was asked for; None is the target's."""
        return self._state.activations

    @property
    def kv_cache(self) -> str | None:
        """The type of keys and values that was asked for; None is that of activations."""
        return self._state.kv_cache

    @property
    def scheme(self) -> str:
        """Calibration scheme of activations."""
        return self._state.scheme

    @property
    def weight_scheme(self) -> str:
        """Calibration scheme of weights."""
        return self._state.weight_scheme

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Exceptions by op or site that still apply to something."""
        return self._state.overrides

    @property
    def plan(self) -> Plan:
        """What is quantized, and why."""
        return self._state.plan

    @property
    def encodings(self) -> EncodingTable:
        """The encodings that are set, by site; `table` has the shared and derived ones too."""
        return self._state.encodings

    @property
    def folded(self) -> Folded:
        """What batch-norm folding left behind, by op."""
        return self._state.folded

    @property
    def reports(self) -> Reports:
        """What each technique did, in order, by its name; `print` shows it in words and tables."""
        return Reports(self._state.reports)

    @property
    def changed_by(self) -> tuple[str, ...]:
        """What has changed the float model since it was opened, in order: names of techniques, "training"."""
        return self._state.changed_by

    @property
    def reference(self) -> Samples | None:
        """The first samples of the calibration data, which an export is proven on."""
        return self._state.reference

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self._state.seed

    @property
    def source(self) -> Path | None:
        """The file that the model was opened from."""
        return self._state.source

    @property
    def run(self) -> RunDirectory | None:
        """Where long steps keep finished work; None keeps it in memory. See `QuantSim.attach`."""
        return self._state.run

    @property
    def progress(self) -> Progress:
        """Where progress is shown. See `QuantSim.attach`."""
        return self._state.progress

    @property
    def workers(self) -> Workers | None:
        """Where layers are solved; None solves them here. See `QuantSim.attach`."""
        return self._state.workers

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments that a saved state needs to be opened again."""
        return self._state.options

    @property
    def params(self) -> ParamReader:
        """The current float parameters, in canonical layout."""
        return self._state.params

    @property
    def table(self) -> EncodingTable:
        """One encoding for every quantized site: shared ones resolved, biases derived.

        Raises:
            EncodingError: the simulation isn't calibrated yet.
        """
        return self._state.table

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the model fixes; None where it is free."""
        return batch_dimension(self._state.inputs)
