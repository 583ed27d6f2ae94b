"""AutoQuant, QuantAnalyzer and mixed precision by AIMET's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitwright.errors import InputError
from bitwright.plugins import registry
from bitwright_aimet._settings import CONFIG_1, SimulationSettings, is_float, read_settings, type_of
from bitwright_aimet._simulation import SimulationModel
from bitwright_aimet._steps import AdaroundParameters, batches

Width = tuple[int, Any]


def evaluation(callback: Callable[..., Any]) -> Callable[[Any], Any]:
    """AIMET's evaluation of a model and a number of samples, on all samples."""
    taken = [p for p in inspect.signature(callback).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return (lambda model: callback(model, None)) if len(taken) > 1 else (callback)


class BaseAutoQuant:
    """AutoQuant but for a framework: bitwright's `auto_quantize` by AIMET's arguments."""

    def __init__(
        self,
        model: Any,
        sample: Any,
        data: Any,
        eval_callback: Callable[..., Any],
        settings: SimulationSettings,
        results_dir: str,
    ) -> None:
        self._model, self._sample, self._data = model, sample, data
        self._evaluate, self._settings = evaluation(eval_callback), settings
        self._out = Path(results_dir)
        self._adaround: AdaroundParameters | None = None
        self.result: Any = None
        """What `auto_quantize` found, once `optimize` was called."""

    def set_adaround_params(self, adaround_params: AdaroundParameters) -> None:
        """Take these for AdaRound: batch-norm folding, equalization and AdaRound are then tried, one after another."""
        self._adaround = adaround_params

    def run_inference(self) -> tuple[SimulationModel, float]:
        """The plain quantized model, and its score."""
        made = self._made()
        made.compute_encodings(self._data)
        return made, float(self._evaluate(made.model))

    def _made(self) -> SimulationModel:
        return SimulationModel(self._model, self._sample, self._settings)

    def optimize(self, allowed_accuracy_drop: float = 0.0) -> tuple[Any, float, str]:
        """Search for the quantized model that loses no more than this.

        Returns:
            The simulated model, its score, and the path of its encodings.
        """
        techniques = None
        if self._adaround is not None:
            techniques = ["fold_batch_norm", "cross_layer_equalization", {"adaround": dict(self._adaround.settings)}]
        options = {k: v for k, v in self._settings.options.items() if k in ("target", "weights", "activations")}
        self.result = registry.tool("auto_quantize")(
            self._model,
            self._data if self._adaround is None else self._adaround.data,
            self._evaluate,
            allowed_drop=allowed_accuracy_drop,
            sample=self._sample,
            techniques=techniques,
            out=self._out,
            name="model",
            encodings_version="0.6.1",
            **options,
        )
        return self.result.model, self.result.score, str(self.result.bundle.files["encodings"])


class WithMixedPrecision(BaseAutoQuant):
    """AutoQuant under the name that promises mixed precision behind it: in bitwright that is a search of its own."""

    def optimize(self, allowed_accuracy_drop: float = 0.0) -> Any:
        """Search for the quantized model that loses no more than this.

        Returns:
            The simulated model, its score, the path of its encodings, and None: no front of mixed precision.
        """
        return (*super().optimize(allowed_accuracy_drop), None)

    def set_mixed_precision_params(self, candidates: Sequence[tuple[Width, Width]], *args: Any, **named: Any) -> None:
        """Not taken.

        Raises:
            InputError: always.
        """
        raise InputError(
            "set_mixed_precision_params: optimize() spends 16-bit activations and 8-bit weights by itself where "
            "nothing else is enough; for candidates of your own, bitwright.mixed_precision(model, data, evaluate, "
            "candidates=[('int8', 'uint8'), ('int4', 'uint8')], allowed_drop=…)"
        )


class BaseQuantAnalyzer:
    """QuantAnalyzer but for a framework: bitwright's `quant_analyzer` by AIMET's arguments."""

    default_config = CONFIG_1

    def __init__(
        self,
        model: Any,
        sample: Any,
        forward_pass_callback: Callable[[Any], Any],
        eval_callback: Callable[[Any], Any],
    ) -> None:
        self._model, self._sample = model, sample
        self._forward, self._evaluate = forward_pass_callback, eval_callback
        self._data: Any = None

    def measure_layers_on(self, data: Any, num_batches: int) -> None:
        """Take the layers' errors, which the page has in any case, on these batches."""
        self._data = batches(data, num_batches)

    def analyzed(
        self,
        quant_scheme: Any,
        default_param_bw: int,
        default_output_bw: int,
        config_file: Any,
        results_dir: str,
        rounding_mode: str = "nearest",
    ) -> Any:
        """Write `analysis.html` and `analysis.json` to a folder.

        `analyze` and `enable_per_layer_mse_loss` have other arguments in each of AIMET's packages, in other places.
        """
        settings = read_settings(
            quant_scheme, default_output_bw, default_param_bw, config_file, rounding_mode=rounding_mode,
            default_config=self.default_config,
        )  # fmt: skip
        made = SimulationModel(self._model, self._sample, settings)
        made.compute_encodings(self._forward)
        return registry.tool("quant_analyzer")(
            made.bitwright,
            self._data if self._data is not None else (self._forward),
            lambda model: float(self._evaluate(model)),
            out=results_dir,
        )


def mixed_precision(
    simulation: SimulationModel,
    candidates: Sequence[tuple[Width, Width]],
    forward_pass_callback: Callable[[Any], Any],
    evaluate: Callable[[Any], Any],
    allowed_accuracy_drop: float | None,
    results_dir: str,
) -> list[tuple[float, float, Mapping[str, str]]]:
    """Give each group of layers the candidate that it needs; the simulation has the result.

    Args:
        candidates: pairs of (width, data type): activations, parameters.

    Returns:
        Relative bit operations, score, and candidate by group of each assignment that was evaluated.
    """
    types = [(_named(param, "int"), _named(activation, "uint")) for activation, param in candidates]
    result = registry.tool("mixed_precision")(
        simulation.settle(),
        forward_pass_callback,
        lambda model: float(evaluate(model)),
        candidates=types,
        allowed_drop=allowed_accuracy_drop,
        solver="greedy",
        out=results_dir,
    )
    simulation.bitwright = result.sim
    simulation.changed(lambda simulation: None)
    return [(p.relative_cost, p.score, p.assignment) for p in result.measured]


def _named(width: Width, integer: str) -> str:
    bits, data_type = width
    return type_of(bits, data_type, integer) if is_float(data_type) else f"{integer}{bits}"


def required(forward_pass_callback: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """The function itself.

    Raises:
        InputError: there is none.
    """
    if forward_pass_callback is None:
        raise InputError("forward_pass_callback: give a function that runs the model on calibration data")
    return forward_pass_callback
