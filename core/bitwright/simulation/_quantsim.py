"""QuantSim: one model, one target, and everything that happens to it from opening to export."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import EllipsisType
from typing import Any, NoReturn, Self, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Bundle, Simulation, Training
from bitwright.data import (
    SAMPLES,
    DataLike,
    Dataset,
    ImageOptions,
    Remembering,
    Samples,
    TextOptions,
)
from bitwright.errors import CapabilityError, InputError
from bitwright.graph import OpKind
from bitwright.grids import Encoding
from bitwright.metrics import Figure
from bitwright.placement import SiteId, SiteKind
from bitwright.progress import Progress
from bitwright.runs import RunDirectory
from bitwright.simulation import _apply, _fork, _set_precision, _training
from bitwright.simulation._measure import measured
from bitwright.simulation._overview import overview, title
from bitwright.simulation._predict import predicted, warn_of_infinities
from bitwright.simulation._site import SiteHandle, site_named
from bitwright.simulation._state import open_simulation, open_state, with_encodings, with_own_numbers
from bitwright.state import SimState, StateView
from bitwright.targets import Target
from bitwright.technique import Technique
from bitwright.workers import open_workers


class QuantSim(StateView):
    """Simulates a model on an integer target, improves it, and exports it.

    Args:
        model: a framework's model object, or a path to a model file.
        sample: one batch, for frameworks that trace a model; not needed for ONNX.
        target: a preset's name (`bitwright targets`), a configuration file, or a `Target`.
        weights, activations: types such as "int8", "int4:block32", "uint16", "float16"; a width alone, such as 8, is
            the integer type with the target's sign; None takes the target's.
            `activations="float"` quantizes weights only; "int8:per_token" and "uint8:dynamic" have their ranges at run
            time.
        scheme: calibration scheme of activations; "percentile:99.9" carries a setting, "tf_enhanced" is "sqnr".
        weight_scheme: calibration scheme of weights.
        overrides: exceptions by op or site, see `placement.build_plan`.
        kv_cache: type of the keys and values of attention, found in the graph: "int8", "int8:per_head",
            "int4:per_token", "float16"; None treats them as all activations.
        backend: a backend's name, if several could open the model.
        seed: of everything random.
        run: where long steps keep finished work, for resuming; None keeps it in memory.
        progress: where progress is shown.

    Raises:
        ModelError: the model can't be opened.
        TargetError: the target's configuration is invalid.
        InputError: no such scheme or type, or an override that names nothing.
        MissingExtraError: the model's framework isn't installed.

    Warns:
        UserWarning: weights were asked to be in blocks of a size that doesn't divide their inputs, or to be unsigned
            where the target makes their grids symmetric.
    """

    def __init__(
        self,
        model: object,
        sample: Batch | None = None,
        *,
        target: str | Path | Mapping[str, Any] | Target = "default",
        weights: str | int | None = None,
        activations: str | int | None = None,
        scheme: str = "sqnr",
        weight_scheme: str = "minmax",
        overrides: Mapping[str, Any] | None = None,
        kv_cache: str | None = None,
        backend: str | None = None,
        seed: int = 0,
        run: RunDirectory | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._state = open_state(
            model,
            sample,
            target=target,
            weights=weights,
            activations=activations,
            scheme=scheme,
            weight_scheme=weight_scheme,
            overrides=overrides,
            kv_cache=kv_cache,
            backend=backend,
            seed=seed,
            run=run,
            progress=progress,
        )
        self._opened: tuple[SimState, Simulation[Any]] | None = None
        """The open simulation, and the state that it was made of."""
        plan = self._state.plan
        for doubt in filter(None, (plan.doubt_of_blocks(), plan.doubt_of_signs())):
            warnings.warn(doubt, stacklevel=2)

    @classmethod
    def of(cls, state: SimState) -> Self:
        """The simulation with a given state, such as one that `dataclasses.replace` made of another's."""
        made = cls.__new__(cls)
        made._state, made._opened = state, None
        return made

    def _become(self, state: SimState) -> Self:
        """Take a state over that is whole: the one place where a simulation changes."""
        stale = self._opened is not None and not state.computes_as(self._opened[0])
        self._state = state  # from here on nothing is left to fail
        if stale:
            self._opened = None
        return self

    def _twin(self, state: SimState) -> Self:
        """Another simulation of the same class."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _state=state, _opened=None)
        return twin

    def attach(
        self,
        *,
        run: RunDirectory | EllipsisType | None = ...,
        progress: Progress | None = None,
        source: Path | None = None,
        reference: Samples | None = None,
        executor: object = ...,
    ) -> Self:
        """Set what serves the work and is not a part of the network; what isn't given stays.

        Args:
            run: where long steps keep finished work, for resuming; None keeps it in memory from now on.
            progress: where progress is shown.
            source: the file that the model was opened from, where it was given as an object.
            reference: samples that exports are proven on, in place of the first ones of the calibration data.
            executor: where techniques solve layers that don't depend on one another, as `workers.open_workers` takes
                it: a number of processes, "local:N" or the address of a Dask scheduler, a Dask client, an executor.
                Results don't depend on it. None solves them here.

        Raises:
            InputError: the executor is none of these.
            MissingExtraError: it is a cluster, and Dask isn't installed.
        """
        state = self._state
        return self._become(
            replace(
                state,
                run=state.run if isinstance(run, EllipsisType) else run,
                progress=progress or state.progress,
                source=source or state.source,
                reference=reference or state.reference,
                workers=state.workers if executor is ... else open_workers(executor),
            )
        )

    def fork(
        self,
        *,
        scheme: str | None = None,
        weight_scheme: str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """A simulation with the same model, encodings and history; what is done to one doesn't touch the other.

        The model isn't copied: backends never change one, they return new ones.

        Args:
            scheme, weight_scheme: other calibration schemes, in force from the next `calibrate` on.
            overrides: further exceptions by op or site, on top of those that it has.

        Raises:
            InputError: an override names nothing, or no type; or a trained model wasn't taken over.
        """
        return self._twin(_fork.fork(self._state, scheme=scheme, weight_scheme=weight_scheme, overrides=overrides))

    def __copy__(self) -> Self:
        return self._twin(self._state)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A fork: states and models are never changed in place, so nothing of them has to be copied."""
        return self._twin(_fork.fork(self._state, wanted_by="a copy"))

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise CapabilityError(
            "a QuantSim can't be pickled: save(folder) keeps it, and QuantSim.load(folder) opens it, in other "
            "processes too"
        )

    def retyped(self, types: Mapping[SiteId, str]) -> Self:
        """A fork with other types at some sites; encodings of another type are dropped, frozen ones too.

        Args:
            types: by tensor or parameter; of tensors that share a grid, all.

        Raises:
            InputError: no such site, or not a type.
        """
        return self._twin(_set_precision.retyped(self._state, types))

    # -- what it is, for people

    def __str__(self) -> str:
        return str(overview(self._state))

    def __repr__(self) -> str:
        return f"<{title(self._state)}>"

    def _repr_html_(self) -> str:
        return overview(self._state).html()

    def __getitem__(self, site: SiteId) -> SiteHandle:
        """One tensor or parameter, to look at its quantizer and to change it: ``sim["conv1.weight"].set("int4")``.

        Raises:
            InputError: the plan has no such site; with the nearest name.
        """
        state = self._state
        return SiteHandle(site_named(state.graph, state.plan, site), lambda: self._state, self._become)

    def __contains__(self, site: object) -> bool:
        return site in self._state.plan

    def __call__(self, *inputs: object, **named: object) -> NDArray[Any] | tuple[NDArray[Any], ...]:
        """The simulation's output for one batch, as numpy: `sim(x)`, `sim(x, mask)`, `sim(ids=x, mask=m)`.

        For tensors of the framework, and gradients, call `model` instead.

        Args:
            inputs: the batch as `calibrate` takes one: in any of its forms, or an array for each of the model's inputs.
            named: arrays by the inputs' names, instead.

        Returns:
            The output; a tuple where the model has several, in the order of `graph.outputs`.

        Raises:
            EncodingError: not calibrated yet.
            InputError: the batch doesn't fit the model.
        """
        if bool(inputs) == bool(named):
            raise InputError("give one batch: an array for each input in order, or all of them by name")
        found = self.predict([named if named else inputs[0] if len(inputs) == 1 else inputs])
        return found[0] if len(found) == 1 else tuple(found)

    def open(
        self,
        data: DataLike,
        *,
        batch_size: int = 8,
        limit: int | None = None,
        text: TextOptions | None = None,
        images: ImageOptions | None = None,
    ) -> Dataset:
        """Data in any accepted form (see `data.open_data`), checked against this model's inputs.

        Text is read with the tokenizer of the folder that the model was opened from, unless `text` names another.
        Images of a folder are given values from 0 to 1, unless `images` says how the network was trained.
        A function of one argument is a forward pass: it is called once with the float model, in the form in which its
        framework runs one, and what it feeds to it are the data.
        """
        return self._state.open(data, batch_size=batch_size, limit=limit, text=text, images=images)

    # -- encodings

    def calibrate(self, data: DataLike | None = None) -> Self:
        """Set the ranges of every site that isn't frozen or kept: weights by their values, activations on `data`.

        Nothing changes if it fails (empty data, NaN). Warns of data that are hardly those that the network was trained
        on, and of weights so small that all of them become zero.

        Args:
            data: as for `open`: arrays, a path, batches; or a forward pass of your own, a function of the model. None
                will do where nothing is calibrated on data: of weights only, and with ranges at run time.

        Raises:
            InputError: the data are empty, don't fit the model, or hold NaN; or there are none and a site needs some.
        """
        self._require_taken("calibrate()")
        return self._become(_apply.calibrated(self._state, data))

    def remembering(self, data: DataLike) -> Remembering:
        """Data as `open` takes them; the first samples that go by can be kept as `reference`."""
        return Remembering(self.open(data), self._state.inputs)

    def set(self, encodings: Mapping[SiteId, Encoding], *, freeze: bool = False) -> Self:
        """Install encodings by hand; `freeze` keeps them through later calibrations.

        Raises:
            EncodingError: a site isn't in the plan, takes its encoding from another, or the scales don't fit.
        """
        return self._become(with_encodings(self._state, encodings, freeze=freeze))

    def set_precision(
        self,
        what: str | OpKind | Iterable[str | OpKind],
        *,
        weights: str | int | None = None,
        activations: str | int | None = None,
        inputs: str | int | None = None,
        strict: bool = True,
    ) -> tuple[_set_precision.Conflict, ...]:
        """Give ops, modules, op types or tensors another type; the last call on a site wins.

        Sites whose type changes need `calibrate` again; arguments and errors are those of `precision.set_precision`.
        Nothing changes if it fails.

        Returns:
            Remarks, and with ``strict=False`` the conflicts.
        """
        state, conflicts = _set_precision.set_precision(
            self._state, what, weights=weights, activations=activations, inputs=inputs, strict=strict
        )
        self._become(state)
        return conflicts

    def load_encodings(
        self, path: str | Path, *, strict: bool = True, partial: bool = True, freeze: bool = True
    ) -> Self:
        """Take encodings from a file of any schema, AIMET's included.

        Args:
            path: the file.
            strict: an entry for a tensor that this plan doesn't quantize is an error; otherwise it is ignored.
            partial: sites without an entry keep what they have (constants of one number get their grid); otherwise they
                are bypassed (left in float).
            freeze: later calibrations keep the loaded ones.

        Raises:
            EncodingError: the file is invalid or doesn't fit the model.
        """
        from bitwright.bundle import read_encodings

        state = self._state
        loaded = read_encodings(Path(path), state.graph, state.plan, strict=strict)
        taken = state if partial else _set_precision.bypassed_but(state, loaded)
        return self._become(with_own_numbers(with_encodings(taken, loaded, freeze=freeze)))

    # -- techniques

    def apply(self, technique: str | Technique, data: DataLike | None = None, /, **settings: object) -> Self:
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
        return self._become(_apply.apply(self._state, technique, data, settings))

    # -- simulation and export

    @property
    def simulation(self) -> Simulation[Any]:
        """The simulation with the encodings in force.

        Raises:
            EncodingError: not calibrated yet.
        """
        if self._opened is None or not self._state.computes_as(self._opened[0]):
            self._opened = self._state, open_simulation(self._state)
        return self._opened[1]

    @property
    def model(self) -> Any:
        """The native model with quantization simulated, for your own evaluation.

        Raises:
            InputError: the model of `trainable` was trained and not taken over: this one has the weights from before.
        """
        self._require_taken("sim.model")
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
        state = _training.started(self._state, Training(range_learning, gradient_scale))
        self._become(state)
        assert state.training is not None
        return state.training.simulation.model

    def take(self) -> Self:
        """Take over the weights and encodings that the model of `trainable` has now; encodings become frozen.

        Raises:
            InputError: `trainable` wasn't called.
            EncodingError: the model was edited in the meantime.
        """
        return self._become(_training.taken(self._state))

    @property
    def untaken(self) -> bool:
        """Whether the model of `trainable` has learned something that `take` hasn't taken over."""
        return _training.is_untaken(self._state)

    def drop_training(self) -> Self:
        """Give up the model of `trainable`, with all that it has learned since it was last taken."""
        return self._become(replace(self._state, training=None))

    def _require_taken(self, what: str) -> None:
        _training.require_taken(self._state, what)

    def predict(self, data: DataLike, *, simulated: bool = True) -> list[NDArray[Any]]:
        """The model's outputs over a whole dataset, in the order of `graph.outputs`.

        Args:
            data: as for `open`.
            simulated: of the simulation, or of the float model.

        Warns:
            NonFiniteWarning: the simulation gives NaN or infinity where the float model doesn't; with the first tensor.
            ImplausibleDataWarning: an input has another scale than in the data that it was calibrated on.

        Returns:
            One array an output: batches after one another along the first axis; outputs of rank 0 one a batch, or the
            scalar itself where there is one batch.
        """
        self._require_taken("predict()")
        return predicted(self._state, self.simulation if simulated else None, data)

    def measure(
        self,
        data: DataLike,
        *metrics: str,
        reference: QuantSim | None = None,
        labels: Sequence[int] | NDArray[np.integer] | None = None,
        output: str | None = None,
    ) -> dict[str, Figure]:
        """Metrics of the simulation, and of the float model beside it, in one pass over the data.

        Args:
            data: as for `open`; not what was calibrated on.
            metrics: "perplexity" ("perplexity:INPUT" names the input that holds the tokens), "kl", "agreement", "top1";
                see `bitwright.metrics`. Positions that an input called a mask has zeros at don't count.
            reference: the simulation whose float model is compared with: a fork made before techniques or training that
                change the float model, or one of the model as it was. Default: this one, where nothing has changed it
                (`changed_by`).
            labels: class indices of the samples, for "top1".
            output: the tensor that holds the logits: an output, or what a network's last softmax reads; default: the
                first output.

        Raises:
            InputError: no such metric or tensor, outputs of another shape, with NaN, or (for "kl" and "perplexity")
                probabilities, or the float model was changed
                and no reference is given.
            EncodingError: not calibrated yet.
        """
        self._require_taken("measure()")
        origin = None if reference is None else reference._state
        return measured(self._state, self.simulation, data, metrics, reference=origin, labels=labels, output=output)

    def warn_of_infinities(self, batch: Batch, outputs: Sequence[NDArray[Any]]) -> bool:
        """Warn where the simulation's outputs for one batch aren't finite and the float model's are (see `predict`)."""
        return warn_of_infinities(self._state, self.simulation, batch, outputs)

    def export(
        self,
        directory: str | Path,
        *,
        name: str = "model",
        encodings_version: str = "1.0.0",
        include_bias: bool | None = None,
        plain_session: bool | None = None,
        reference_samples: int = SAMPLES,
        formats: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Bundle:
        """Write the float model with updated weights, its encodings, the quantized artefact and the report.

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
                simulation makes of them; 0 for none, at most the first batch's.
            formats: which files are written beside the encodings and the report: of the backend ("onnx", "qdq", …) and
                of plugins ("gguf", "compressed_tensors", …), by name, or as a mapping of names to settings. Default:
                all that the backend's bundles have. What a plugin's format holds is read back and is equal to the
                simulation's weights, bit for bit.

        Raises:
            EncodingError: the simulation isn't calibrated yet, or a format has no place for a grid.
            InputError: a file that the model was opened from, or that no export has written, would be overwritten; a
                file can't be written; no such format.
            ModelError: the quantized model that was written departs from the simulation; the message names the tensor.
        """
        from bitwright.bundle import export

        self._require_taken("export()")
        return export(
            self._state, lambda: self.simulation, Path(directory), name, encodings_version, include_bias, plain_session,
            reference_samples, formats,
        )  # fmt: skip

    def save(self, directory: str | Path) -> Path:
        """Keep the whole state (model, encodings, provenance) to go on with `load`.

        Raises:
            InputError: a file is in the way that isn't of a saved simulation, or one can't be written.
        """
        from bitwright.simulation._saved_state import save

        self._require_taken("save()")
        return save(self._state, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, model: object = None, **options: object) -> Self:
        """Go on from `save`. `model` replaces the saved one (it must have the same graph)."""
        from bitwright.simulation._saved_state import load

        return cls.of(load(Path(directory), model, options))

    def activation_sites(self) -> tuple[SiteId, ...]:
        """Every activation that the target quantizes, shared ones included."""
        return tuple(s for s in self.plan.quantized if self.plan[s].kind is SiteKind.ACTIVATION)
