"""QuantSim: one model, one target, and everything that happens to it from opening to export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import (
    Batch,
    Bundle,
    ParamReader,
    Session,
    Simulation,
    Tap,
    TrainableSimulation,
    Training,
    check_encodings,
)
from bitwright.bundle import SAMPLES, Remembering, Samples
from bitwright.calibration import full_table, guarded, weight_encodings
from bitwright.data import Dataset, batch_dimension, joined, open_data
from bitwright.errors import EncodingError, InputError
from bitwright.graph import Graph, OpId
from bitwright.grids import Encoding, EncodingTable
from bitwright.placement import Derived, Plan, SiteId, SiteKind, build_plan, is_lost
from bitwright.progress import Progress, Silent
from bitwright.runs import RunDirectory
from bitwright.simulation import _apply as applying
from bitwright.simulation import bias_forms
from bitwright.simulation._opening import open_model
from bitwright.targets import Target, load_target, target_names
from bitwright.technique import Report, Technique

if TYPE_CHECKING:
    from bitwright.simulation._set_precision import Conflict


class QuantSim:
    """Simulates a model on an integer target, improves it, and exports it.

    Args:
        model: a framework's model object, or a path to a model file.
        sample: one batch, for frameworks that trace a model; not needed for ONNX.
        target: a preset's name (`bitwright targets`), a configuration file, or a `Target`.
        weights, activations: types such as "int8", "int4:block32", "uint16", "float16"; None takes the target's.
        scheme: calibration scheme of activations; "percentile:99.9" carries a setting.
        weight_scheme: calibration scheme of weights.
        overrides: exceptions by op or site, see `placement.build_plan`.
        backend: a backend's name, if several could open the model.
        seed: of everything random.
        run: where long steps keep finished work, for resuming; None keeps it in memory.
        progress: where progress is shown.

    Raises:
        ModelError: the model can't be opened.
        TargetError: the target's configuration is invalid.
        MissingExtraError: the model's framework isn't installed.
    """

    def __init__(
        self,
        model: Any,
        sample: Batch | None = None,
        *,
        target: str | Path | Mapping[str, Any] | Target = "default",
        weights: str | None = None,
        activations: str | None = None,
        scheme: str = "sqnr",
        weight_scheme: str = "minmax",
        overrides: Mapping[str, Any] | None = None,
        backend: str | None = None,
        seed: int = 0,
        run: RunDirectory | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.target = load_target(target)
        self.weights, self.activations = weights, activations
        self.scheme, self.weight_scheme = scheme, weight_scheme
        self.overrides = dict(overrides or {})
        self.seed, self.run = seed, run
        self.progress: Progress = progress or Silent()
        self.source = Path(model) if isinstance(model, (str, Path)) else None
        self.backend, self.native = open_model(model, sample, backend)
        self.folded: dict[OpId, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        self.reports: list[tuple[str, Report]] = []
        self.encodings = EncodingTable()
        self._simulation: Simulation[Any] | None = None
        self._training: tuple[TrainableSimulation, Training, str] | None = None
        self.reference: Samples | None = None
        """The first samples of the calibration data, which an export is proven on."""
        self.refresh()

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments that a saved state needs to be opened again."""
        preset = self.target.name in target_names()
        return {
            "target": self.target.name if preset else self.target.config.model_dump(mode="json", exclude_none=True),
            "weights": self.weights,
            "activations": self.activations,
            "scheme": self.scheme,
            "weight_scheme": self.weight_scheme,
            "overrides": self.overrides,
            "seed": self.seed,
        }

    def refresh(self) -> None:
        """Rebuild graph and plan after an edit; encodings of sites that are gone go too."""
        known = getattr(self, "graph", None)
        self.graph: Graph = self.backend.graph(self.native)
        if known is not None:
            # Exceptions for what a fold has removed have nothing left to apply to; a wrong name was refused at first.
            gone = {k for k, v in self.overrides.items() if is_lost(known, self.graph, k, v)}
            self.overrides = {k: v for k, v in self.overrides.items() if k not in gone}
        self.plan: Plan = build_plan(
            self.graph,
            self.target,
            weights=self.weights,
            activations=self.activations,
            scheme=self.scheme,
            weight_scheme=self.weight_scheme,
            overrides=self.overrides,
        )
        self.encodings = self.encodings.restricted(set(self.plan))
        self._simulation = None

    @property
    def params(self) -> ParamReader:
        """The current float parameters, in canonical layout."""
        return ParamReader(self.backend, self.native, self.graph)

    def open(self, data: Any, *, batch_size: int = 8, limit: int | None = None) -> Dataset:
        """Data in any accepted form (see `data.open_data`), checked against this model's inputs."""
        if isinstance(data, Dataset):
            return data
        return open_data(data, self.backend.input_specs(self.native), batch_size=batch_size, limit=limit)

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the model fixes; None where it is free."""
        return batch_dimension(self.backend.input_specs(self.native))

    # -- encodings

    def calibrate(self, data: Any) -> Self:
        """Set the ranges of every site that isn't frozen: weights by their values, activations on `data`.

        Nothing changes if it fails (empty data, NaN).

        Raises:
            InputError: the data are empty, don't fit the model, or hold NaN.
        """
        self._require_taken("calibrate()")
        dataset = self.remembering(data)
        params = self.params
        table = EncodingTable(self.encodings.frozen, self.encodings.provenance)
        table = table.merged(weight_encodings(self.plan, params, table))
        table = table.merged(applying.calibrated_activations(self, table, dataset))
        self.encodings = guarded(self.plan, table, params)
        self.reference = dataset.taken()
        self._simulation = None
        return self

    def remembering(self, data: Any) -> Remembering:
        """Data as `open` takes them; the first samples that go by can be kept as `reference`."""
        return Remembering(self.open(data), self.backend.input_specs(self.native))

    @property
    def table(self) -> EncodingTable:
        """One encoding for every quantized site: shared ones resolved, biases derived.

        Raises:
            EncodingError: the simulation isn't calibrated yet.
        """
        return full_table(self.plan, self.encodings)

    def set(self, encodings: Mapping[SiteId, Encoding], *, freeze: bool = False) -> Self:
        """Install encodings by hand; `freeze` keeps them through later calibrations.

        Raises:
            EncodingError: a site isn't in the plan, takes its encoding from another, or the scales don't fit.
        """
        check_encodings(self.graph, self.plan, encodings)
        self.encodings = self.encodings.merged({s: e.with_(frozen=e.frozen or freeze) for s, e in encodings.items()})
        self._simulation = None
        return self

    def set_precision(
        self,
        what: Any,
        *,
        weights: str | None = None,
        activations: str | None = None,
        inputs: str | None = None,
        strict: bool = True,
    ) -> tuple[Conflict, ...]:
        """Give ops, modules, op types or tensors another type, see `_set_precision.set_precision`."""
        from bitwright.simulation._set_precision import set_precision

        return set_precision(self, what, weights=weights, activations=activations, inputs=inputs, strict=strict)

    def load_encodings(
        self, path: str | Path, *, strict: bool = True, partial: bool = True, freeze: bool = True
    ) -> Self:
        """Take encodings from a file of any schema, AIMET's included.

        Args:
            path: the file.
            strict: an entry for a tensor that this plan doesn't quantize is an error; otherwise it is ignored.
            partial: sites without an entry keep what they have; otherwise they are bypassed (left in float).
            freeze: later calibrations keep the loaded ones.

        Raises:
            EncodingError: the file is invalid or doesn't fit the model.
        """
        from bitwright.bundle import read_encodings
        from bitwright.simulation._set_precision import retyped

        loaded = read_encodings(Path(path), self.graph, self.plan, strict=strict)
        if not partial:
            missing = {
                s: "float"
                for s in self.plan.quantized
                if self.plan.root(s) not in loaded and not isinstance(self.plan[s].decision, Derived)
            }
            self.overrides = retyped(self, missing).overrides
            self.refresh()
        return self.set(loaded, freeze=freeze)

    # -- techniques

    def apply(self, technique: str | Technique, data: Any = None, /, **settings: Any) -> Self:
        """Run one technique and take its result. Nothing changes if it fails.

        Args:
            technique: a registered name or alias, or an object.
            data: calibration data, where the technique needs some.
            settings: the technique's own.

        Raises:
            PluginError: unknown technique.
            CapabilityError: the backend, or the absence of data, doesn't allow it.
            InputError: a setting or the data are invalid.
        """
        self._require_taken("apply()")
        applying.apply(self, technique, data, settings)
        return self

    # -- simulation and export

    @property
    def simulation(self) -> Simulation[Any]:
        """The simulation with the encodings in force.

        Raises:
            EncodingError: not calibrated yet.
        """
        if self._simulation is None:
            missing = [s for s in (*self.plan.activations, *self.plan.parameters) if s not in self.encodings]
            if missing:
                raise EncodingError(
                    f"{len(missing)} sites have no encoding yet, {missing[0]!r} first: call calibrate(data)"
                )
            # With the derived int32 biases, as the target has them.
            self._simulation = bias_forms.simulate(self.backend, self.native, self.plan, self.table)
        return self._simulation

    @property
    def model(self) -> Any:
        """The native model with quantization simulated, for your own evaluation."""
        return self.simulation.model

    def trainable(self, *, range_learning: bool = False, gradient_scale: bool = False) -> Any:
        """The native simulated model for quantization-aware training in your own loop; `take` takes its weights over.

        Until then, calibration, techniques, predictions, exports and saving are refused once it was trained. A new
        call starts again from the weights that were last taken.

        Args:
            range_learning: scales and zero points are trained too, as parameters of the model; otherwise activations
                keep their grids, and those of weights follow the weights, step by step.
            gradient_scale: even out the gradients of learned scales, as LSQ does.

        Raises:
            CapabilityError: the backend can't train.
            EncodingError: not calibrated yet.
        """
        from bitwright.simulation import _training as training

        settings = Training(range_learning, gradient_scale)
        simulation = training.start(self, settings)
        self._training = simulation, settings, training.state(self, simulation)
        return simulation.model

    def take(self) -> Self:
        """Take over the weights and encodings that the model of `trainable` has now; encodings become frozen.

        Raises:
            InputError: `trainable` wasn't called.
            EncodingError: the model was edited in the meantime.
        """
        from bitwright.simulation import _training as training

        if self._training is None:
            raise InputError("there is no model in training: call trainable() first")
        simulation, settings, _ = self._training
        encodings = training.learned(self, simulation, settings)
        taken = training.state(self, simulation)
        self.native, self.encodings = simulation.float_model(), encodings
        self._training = simulation, settings, taken
        self.refresh()
        return self

    def drop_training(self) -> Self:
        """Give up the model of `trainable`, with all that it has learned since it was last taken."""
        self._training = None
        return self

    def _require_taken(self, what: str) -> None:
        if self._training is not None:
            from bitwright.simulation import _training as training

            training.require_taken(self, what)

    def predict(self, data: Any, *, simulated: bool = True) -> list[NDArray[Any]]:
        """The model's outputs over a whole dataset, in the order of `graph.outputs`.

        Args:
            data: as for `open`.
            simulated: of the simulation, or of the float model.

        Warns:
            NonFiniteWarning: the simulation gives NaN or infinity where the float model doesn't; with the first tensor.

        Returns:
            One array an output: batches after one another along the first axis; outputs of rank 0 one a batch, or the
            scalar itself where there is one batch.
        """
        self._require_taken("predict()")
        taps = [Tap(t) for t in self.graph.outputs]
        session = self.simulation.session(taps) if simulated else self.backend.session(self.native, taps)
        batches, warned = [], not simulated
        for batch in self.open(data):
            # An output that is an input is handed out as it came: no op of the target touches it.
            passed = {tap: np.asarray(batch[tap.tensor]) for tap in taps if tap.tensor in self.graph.inputs}
            found = {**session.run(batch), **passed}
            batches.append(found)
            warned = warned or self.warn_of_infinities(batch, [found[tap] for tap in taps])
        if not batches:
            raise InputError("there are no data to predict on")
        return [joined([b[tap] for b in batches]) for tap in taps]

    def warn_of_infinities(self, batch: Batch, outputs: Sequence[NDArray[Any]]) -> bool:
        """Warn where the simulation's outputs for one batch aren't finite and the float model's are (see `predict`)."""
        from bitwright.simulation._finiteness import warn_where_it_began

        def floating(taps: Sequence[Tap]) -> Session:
            return self.backend.session(self.native, taps)

        return warn_where_it_began(self.graph, outputs, batch, self.simulation.session, floating)

    def export(
        self,
        directory: str | Path,
        *,
        name: str = "model",
        encodings_version: str = "1.0.0",
        include_bias: bool | None = None,
        plain_session: bool | None = None,
        reference_samples: int = SAMPLES,
    ) -> Bundle:
        """Write the float model with updated weights, its encodings, the quantized artefact and `report.json`.

        The quantized ONNX file is compared with the simulation on a few samples, tensor by tensor; what computes
        something else isn't handed out. The report records what was simulated, for `bitwright verify`.

        Args:
            directory: made if it doesn't exist.
            name: stem of the files.
            encodings_version: schema of the encodings file (0.6.1, 1.0.0, 2.0.0, 2.1.0).
            include_bias: write int32 bias encodings; default: in schemas from 2.0.0 on.
            plain_session: make the quantized ONNX file exact in ONNX Runtime's default sessions on every CPU: weights
                whose products can saturate without VNNI are stored as uint8, values unchanged, which runs slower;
                `Bundle.stored_anew` names them. Default: for targets with `pair_sum_bits`, such as onnxruntime-cpu.
            reference_samples: how many of the first calibration samples go into `NAME.record.npz`, with what the
                simulation makes of them; 0 for none.

        Raises:
            EncodingError: the simulation isn't calibrated yet.
            InputError: a file that the model was opened from would be overwritten, or can't be written.
            ModelError: the quantized model that was written departs from the simulation; the message names the tensor.
        """
        from bitwright.bundle import export

        self._require_taken("export()")
        return export(self, Path(directory), name, encodings_version, include_bias, plain_session, reference_samples)

    def save(self, directory: str | Path) -> Path:
        """Keep the whole state (model, encodings, provenance) to go on with `load`."""
        from bitwright.simulation._saved_state import save

        self._require_taken("save()")
        return save(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, model: Any = None, **options: Any) -> Self:
        """Go on from `save`. `model` replaces the saved one (it must have the same graph)."""
        from bitwright.simulation._saved_state import load

        return load(cls, Path(directory), model, options)

    def activation_sites(self) -> tuple[SiteId, ...]:
        """Every activation that the target quantizes, shared ones included."""
        return tuple(s for s in self.plan.quantized if self.plan[s].kind is SiteKind.ACTIVATION)
