"""`QuantizationSimModel` but for a framework: AIMET's calls on a `QuantSim`."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from bitwright import formats
from bitwright.backend import Bundle
from bitwright.bundle import encodings_file, read_encodings
from bitwright.errors import EncodingError, InputError, ModelError
from bitwright.files import Scratch, atomic_write, make_directory
from bitwright.grids import EncodingTable
from bitwright.placement import SiteKind
from bitwright.simulation import QuantSim
from bitwright_aimet._settings import SimulationSettings

QDQ = "qdq"
"""Purpose of the quantized ONNX model in a bundle."""
_NOT_GIVEN: Any = object()
_SIMULATIONS: WeakValueDictionary[int, SimulationModel] = WeakValueDictionary()
"""By `id` of the model that each has handed out last."""


class SimulationModel:
    """A simulation with AIMET's calls.

    Attributes:
        bitwright: the `QuantSim` behind it, for everything that AIMET has no name for.
    """

    encoding_version = "0.6.1"
    """Schema of exported encodings unless another is asked for."""

    def __init__(self, model: Any, sample: Any, settings: SimulationSettings) -> None:
        self.bitwright = QuantSim(model, sample, **settings.options)
        self._range_learning = settings.range_learning
        self._out: Any = None

    # -- the model

    @property
    def model(self) -> Any:
        """The simulated model, to evaluate and to train; another object after a call that changes encodings.

        Raises:
            EncodingError: `compute_encodings` wasn't called, and no encodings were loaded.
        """
        if self._out is None:
            try:
                self._out = self._opened()
            except EncodingError as error:
                raise EncodingError(
                    f"the simulated model is there once there are encodings: call compute_encodings first, then "
                    f"compile, evaluate or train it ({error})"
                ) from None
            _SIMULATIONS[id(self._out)] = self
        return self._out

    def _opened(self) -> Any:
        return self.bitwright.trainable(range_learning=self._range_learning)

    def changed(self, change: Callable[[QuantSim], object]) -> None:
        """Do something to the simulation, with what was trained so far."""
        self.settle()
        change(self.bitwright)
        self.bitwright.drop_training()
        self._out = None

    def settle(self) -> QuantSim:
        """The simulation with the weights and grids that `model` has now."""
        if self.bitwright.untaken:
            self.bitwright.take()
        return self.bitwright

    # -- encodings

    def compute_encodings(self, forward_pass_callback: Any, forward_pass_callback_args: Any = _NOT_GIVEN) -> None:
        """Calibrate by a function that runs the model, once, on the float model; or by data.

        Args:
            forward_pass_callback: called with the model, and with the second argument where it is given or needed.
            forward_pass_callback_args: whatever the function takes.
        """
        run = forward_pass_callback
        if callable(run):
            run = forward_pass(run, forward_pass_callback_args)
        self.changed(lambda simulation: simulation.calibrate(run))

    def set_percentile_value(self, percentile_value: float) -> None:
        """Of the scheme "percentile", in force from the next `compute_encodings` on.

        Raises:
            InputError: not between 50 and 100.
        """
        if not 50 <= percentile_value <= 100:
            raise InputError(f"percentile_value={percentile_value}: between 50 and 100")
        self.settle()
        self.bitwright = self.bitwright.fork(scheme=f"percentile:{percentile_value}")
        self._out = None

    def save_encodings_to_json(self, path: str, filename_prefix: str) -> Path:
        """Write the encodings alone, by the names that tensors have in the framework."""
        state = self.settle().state
        file = encodings_file(state.graph, state.plan, state.table, "0.6.1")
        return formats.write(file, make_directory(path) / f"{filename_prefix}.json")

    def load_encodings(
        self,
        encodings: str | Path,
        strict: bool = True,
        partial: bool = True,
        requires_grad: bool | None = None,
        allow_overwrite: bool = True,
    ) -> None:
        """Take encodings from a file of any schema; with `allow_overwrite=False` they stay at later calibrations.

        Raises:
            InputError: a mapping is given, or `requires_grad`.
        """
        if isinstance(encodings, Mapping):
            raise InputError("encodings: give the path of a file, or QuantSim.set with one Encoding for each site")
        if requires_grad is not None:
            raise InputError(
                "requires_grad: ranges are trained by a range-learning scheme, all or none: quant_scheme="
                "QuantScheme.training_range_learning_with_tf_init"
            )
        self.changed(
            lambda simulation: simulation.load_encodings(
                encodings, strict=strict, partial=partial, freeze=not allow_overwrite
            )
        )

    def load_and_freeze_encodings(
        self, encoding_path: str | Path, ignore_when_quantizer_disabled: bool = False
    ) -> None:
        """Take encodings from a file, which later calibrations keep."""
        self.load_encodings(encoding_path, strict=not ignore_when_quantizer_disabled, allow_overwrite=False)

    def set_and_freeze_param_encodings(self, encoding_path: str | Path) -> None:
        """Take the encodings of parameters from a file, such as AdaRound's; later calibrations keep them.

        Raises:
            EncodingError: the file holds none of this model's parameters.
        """
        path, state = Path(encoding_path), self.bitwright.state
        found = read_encodings(path, state.graph, state.plan, strict=False)
        held = {site: e for site, e in found.items() if state.plan[site].kind is SiteKind.PARAMETER}
        if not held:
            raise EncodingError(f"{path.name}: there is no encoding of a parameter of this model in it")
        self.changed(lambda simulation: simulation.set(held, freeze=True))

    def exclude_layers_from_quantization(self, layers_to_exclude: Iterable[Any]) -> None:
        """Leave layers in float: their weights and outputs; layers, or their names."""
        for layer in layers_to_exclude:
            name = self.name_of(layer)
            has_weights = any(op.weight for op in self.bitwright.graph.ops if op.id == name or op.id.startswith(name))
            weights = {"weights": "float"} if has_weights else {}
            self.changed(lambda s, n=name, w=weights: s.set_precision(n, activations="float", **w))  # type: ignore[misc]

    def name_of(self, layer: Any) -> str:
        """The name of a layer, or of what is a name already."""
        return str(getattr(layer, "name", layer))

    # -- export

    def export(
        self, path: str, filename_prefix: str, *args: Any, encoding_version: str | None = None, **kwargs: Any
    ) -> Bundle:
        """Write the model and its encodings, and what `QuantSim.export` writes beside them.

        Further arguments of AIMET's (a sample for ONNX, options of the exporter) aren't needed and not looked at.
        """
        version = encoding_version or self.encoding_version
        return self.settle().export(path, name=filename_prefix, encodings_version=version)


def write_qdq(quantsim: QuantSim, path: Path) -> Path:
    """Write the quantized ONNX model of an export that was proven, and nothing else of it.

    Raises:
        ModelError: ONNX can't express the model; the warning of the export says why.
    """
    make_directory(path.parent)
    with Scratch() as folder:
        bundle = quantsim.export(folder, name=path.stem)
        if QDQ not in bundle.files:
            raise ModelError(
                "there is no quantized ONNX model of this network: see the warning; sim.export writes the rest"
            )
        made = bundle.files[QDQ]
        # Large weights lie in a file beside, which the model calls by name.
        for source in sorted(folder.glob(f"{made.name}*"), reverse=True):
            with atomic_write(path if source == made else path.parent / source.name) as file, source.open("rb") as read:
                shutil.copyfileobj(read, file)
    return path


def forward_pass(function: Callable[..., Any], argument: Any = _NOT_GIVEN) -> Callable[[Any], Any]:
    """AIMET's callback of a model and an argument, as a function of the model alone."""
    if argument is _NOT_GIVEN:
        argument, needs = None, len(_required(function)) > 1
    else:
        needs = True
    return (lambda model: function(model, argument)) if needs else (function)


def _required(function: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def simulation_of(model: Any) -> SimulationModel:
    """The simulation that a simulated model came from.

    Raises:
        InputError: none has handed it out, or it has handed out another one since.
    """
    if isinstance(model, SimulationModel):
        return model
    found = _SIMULATIONS.get(id(model))
    if found is None or found._out is not model:
        raise InputError(
            f"this {type(model).__name__} isn't the `model` that a QuantizationSimModel has now; give sim.model, or "
            "the QuantizationSimModel itself"
        )
    return found


def param_encodings(simulation: QuantSim, sites: Iterable[str], path: str, filename_prefix: str) -> Path:
    """Write encodings of parameters alone, for `set_and_freeze_param_encodings`."""
    state, wanted = simulation.state, set(sites)
    table = EncodingTable({s: e for s, e in state.encodings.items() if s in wanted}, state.encodings.provenance)
    file = encodings_file(state.graph, state.plan, table, "0.6.1")
    return formats.write(file, make_directory(path) / f"{filename_prefix}.encodings")
