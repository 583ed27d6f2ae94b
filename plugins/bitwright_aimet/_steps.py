"""AIMET's techniques on a `QuantSim`: their arguments as bitwright's settings and data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from bitwright.errors import InputError
from bitwright.placement import SiteKind
from bitwright.simulation import QuantSim
from bitwright_aimet._settings import CONFIG_1, read_settings, refuse


def fold(simulation: QuantSim) -> list[tuple[str, str]]:
    """Fold batch norms into the layers beside them; (layer, batch norm) of each, by name."""
    simulation.apply("fold_batch_norm", standalone=False)
    rows = simulation.reports[-1][1].rows
    return [(str(into), str(norm)) for norm, into, how, _ in rows if how in ("backward", "forward")]


def equalize(simulation: QuantSim) -> list[tuple[str, str]]:
    """Fold batch norms, equalize layers that follow each other, absorb high biases; what was folded."""
    folded = fold(simulation)
    simulation.apply("cross_layer_equalization")
    return folded


def batches(loader: Any, count: int | None, forward_fn: Callable[[Any, Any], Any] | None = None) -> Any:
    """The first batches of a loader as calibration data; run by the user's function where there is one.

    Raises:
        InputError: the loader can be gone through only once.
    """
    if forward_fn is not None:

        def run(model: Any) -> None:
            for batch in islice(loader, count):
                forward_fn(model, batch)

        return run
    if hasattr(loader, "__next__"):
        raise InputError(f"a {type(loader).__name__} can be gone through only once; give a loader or a list of batches")
    return lambda: islice(iter(loader), count)


class AdaroundParameters:
    """What AdaRound works on.

    Args:
        data_loader: batches, or (batch, labels).
        num_batches: how many of them.
        default_num_iterations: None searches the roundings directly, which needs no iterations; a number takes the
            paper's gradient descent with so many steps.
        default_reg_param: not taken: the descent's regularization is relative to a layer's error here.
        default_beta_range, default_warm_start: of the descent.
        forward_fn: runs the model on a batch, where calling it isn't enough.
    """

    def __init__(
        self,
        data_loader: Any,
        num_batches: int,
        default_num_iterations: int | None = None,
        default_reg_param: float = 0.01,
        default_beta_range: tuple[float, float] = (20, 2),
        default_warm_start: float = 0.2,
        forward_fn: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        refuse(
            {
                "default_reg_param": (
                    default_reg_param,
                    0.01,
                    "QuantSim.apply('adaround', data, solver='gradient', regularization=1.0) scales it by each layer",
                )
            }
        )
        self.data = batches(data_loader, num_batches, forward_fn)
        self.settings: dict[str, Any] = {}
        if default_num_iterations is not None:
            first, last = default_beta_range
            self.settings = {
                "solver": "gradient",
                "iterations": default_num_iterations,
                "beta": (float(first), float(last)),
                "warm_start": default_warm_start,
            }


class DataSetAdaroundParameters(AdaroundParameters):
    """The same by the names of AIMET for TensorFlow and Keras: `data_set` has batches, without labels or with."""

    def __init__(
        self,
        data_set: Any,
        num_batches: int,
        default_num_iterations: int | None = None,
        default_reg_param: float = 0.01,
        default_beta_range: tuple[float, float] = (20, 2),
        default_warm_start: float = 0.2,
    ) -> None:
        super().__init__(
            data_set, num_batches, default_num_iterations, default_reg_param, default_beta_range, default_warm_start
        )


def adaround_simulation(
    model: Any,
    sample: Any,
    params: AdaroundParameters,
    param_bw: int,
    overrides: Any,
    ignored: Any,
    quant_scheme: Any,
    config_file: Any,
    name_of: Callable[[Any], str],
    default_config: str = CONFIG_1,
) -> tuple[QuantSim, list[str]]:
    """A simulation whose weights AdaRound has rounded, and which weights these are.

    Args:
        overrides: AIMET's `param_bw_override_list`: pairs of a layer and a width.
        ignored: AIMET's `ignore_quant_ops_list`: layers that stay as they are.
        name_of: the name of a layer.
        default_config: the target where `config_file` is None; that of the simulation which is given the encodings.
    """
    settings = read_settings(
        quant_scheme or "tf_enhanced", param_bw=param_bw, config_file=config_file, default_config=default_config
    )
    widths = {name_of(layer): {"weights": f"int{bits}"} for layer, bits in overrides or ()}
    simulation = QuantSim(model, sample, overrides=widths, **settings.options)
    exclude = tuple(name_of(layer) for layer in ignored or ())
    simulation.apply("adaround", params.data, exclude=exclude, **params.settings)
    plan = simulation.plan
    rounded = [s for s, e in simulation.encodings.items() if e.frozen and plan[s].kind is SiteKind.PARAMETER]
    return simulation, rounded


class QuantParams:
    """Types and scheme of bias correction.

    Args:
        weight_bw, act_bw: widths.
        round_mode: "nearest".
        quant_scheme: of ranges.
        config_file: a configuration, or a target's name.
    """

    default_config = CONFIG_1

    def __init__(
        self,
        weight_bw: int = 8,
        act_bw: int = 8,
        round_mode: str = "nearest",
        quant_scheme: Any = "tf_enhanced",
        config_file: Any = None,
    ) -> None:
        self.settings = read_settings(
            quant_scheme, act_bw, weight_bw, config_file, rounding_mode=round_mode, default_config=self.default_config
        )


def corrected(
    model: Any, sample: Any, params: QuantParams, data: Any, layers_to_ignore: Any, only_empirical: bool
) -> QuantSim:
    """A simulation with corrected biases.

    Raises:
        InputError: layers are to be left out.
    """
    refuse(
        {
            "layers_to_ignore": (
                list(layers_to_ignore or ()),
                [],
                "a layer that stays in float isn't corrected: QuantSim(model, …, overrides={'layer': 'float'})"
                ".apply('bias_correction', data)",
            )
        }
    )
    simulation = QuantSim(model, sample, **params.settings.options)
    if not only_empirical:
        fold(simulation)
    return simulation.apply("bias_correction", data, mode="empirical" if only_empirical else "auto")


def seq_mse(simulation: QuantSim, data: Any, num_candidates: int, **settings: Any) -> QuantSim:
    """Weight scales by the layers' output errors; they are frozen, as AIMET does."""
    return simulation.apply("seq_mse", data, candidates=num_candidates, **settings)


def first_samples(data: Any, count: int | None) -> Any:
    """A loader's batches until they hold so many samples."""
    if count is None:
        return data

    def limited() -> Any:
        left = count
        for item in data:
            yield item
            first = item[0] if isinstance(item, tuple | list) else item
            if isinstance(first, dict):
                first = next(iter(first.values()))
            left -= len(first)
            if left <= 0:
                return

    return limited
