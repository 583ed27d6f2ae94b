"""AIMET's arguments of a simulation, as `QuantSim` takes them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from typing import Any

from bitwright.errors import InputError
from bitwright.targets import load_target

_SCHEMES = {
    "min_max": ("minmax", "minmax", False),
    "tf": ("minmax", "minmax", False),
    "post_training_tf": ("minmax", "minmax", False),
    "tf_enhanced": ("sqnr", "sqnr", False),
    "post_training_tf_enhanced": ("sqnr", "sqnr", False),
    "percentile": ("percentile:100", "minmax", False),
    "post_training_percentile": ("percentile:100", "minmax", False),
    "training_range_learning_with_tf_init": ("minmax", "minmax", True),
    "training_range_learning_with_tf_enhanced_init": ("sqnr", "sqnr", True),
    "range_learning_tf": ("minmax", "minmax", True),
    "range_learning_tf_enhanced": ("sqnr", "sqnr", True),
}
"""AIMET's name → schemes of activations and weights, and whether ranges are learned in training."""


CONFIG_1, CONFIG_2 = "per_tensor", "default"
"""The targets that no configuration means: in AIMET 1, which Keras and sessions follow, and in AIMET 2, which PyTorch
and ONNX follow. There Conv, ConvTranspose, Gemm and MatMul have a scale for each channel."""


@dataclass(frozen=True)
class SimulationSettings:
    """What AIMET's constructor says of a simulation.

    Attributes:
        target, weights, activations, scheme, weight_scheme: as `QuantSim` takes them.
        range_learning: of the model that is trained.
    """

    target: Any
    weights: str | None
    activations: str | None
    scheme: str
    weight_scheme: str
    range_learning: bool

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `QuantSim`, and of tools that open a model."""
        names = ("target", "weights", "activations", "scheme", "weight_scheme")
        return {name: getattr(self, name) for name in names}


def read_settings(
    quant_scheme: Any = None,
    output_bw: int = 8,
    param_bw: int = 8,
    config_file: Any = None,
    data_type: Any = None,
    rounding_mode: str = "nearest",
    *,
    default_config: str = CONFIG_1,
) -> SimulationSettings:
    """AIMET's arguments, checked; without a `config_file` the target is `default_config`.

    Raises:
        InputError: an argument that AIMET doesn't have either, or that means nothing here.
        TargetError: the configuration is invalid.
    """
    if rounding_mode != "nearest":
        raise InputError(
            f"rounding_mode={rounding_mode!r}: bitwright rounds to the nearest grid point, half to even, as ONNX's "
            "QuantizeLinear and the targets do"
        )
    scheme, weight_scheme, learning = _SCHEMES[scheme_name(quant_scheme)]
    target = load_target(default_config if config_file is None else os.fspath(config_file))
    symmetric = bool(target.config.defaults.ops.is_symmetric)
    defaults = target.config.bitwright
    return SimulationSettings(
        target,
        _type(param_bw, data_type, "int", defaults.weights),
        _type(output_bw, data_type, "int" if symmetric else "uint", defaults.activations),
        scheme,
        weight_scheme,
        learning,
    )


def scheme_name(quant_scheme: Any) -> str:
    """AIMET's name of a scheme, of its enumeration or as text.

    Raises:
        InputError: there is none of that name.
    """
    name = "min_max" if quant_scheme is None else getattr(quant_scheme, "name", quant_scheme)
    if name not in _SCHEMES:
        raise InputError(f"quant_scheme={quant_scheme!r}: there are {', '.join(_SCHEMES)}")
    return str(name)


def is_float(data_type: Any) -> bool:
    """Whether AIMET's `QuantizationDataType` says float."""
    return str(getattr(data_type, "name", data_type)) == "float"


def type_of(bits: int, data_type: Any, integer: str) -> str:
    """A type as bitwright writes it, of a width and AIMET's `QuantizationDataType`; "float" for 32-bit floats.

    Raises:
        InputError: there is no such type.
    """
    if not is_float(data_type):
        return f"{integer}{bits}"
    if bits not in (8, 16, 32):
        raise InputError(f"float with {bits} bits: there are fp8 (8), float16 (16) and float (32)")
    return {8: "fp8", 16: "float16", 32: "float"}[bits]


def _type(bits: int, data_type: Any, integer: str, default: str) -> str | None:
    """The type, or None where it is the target's own: then each op's own symmetry holds."""
    found = type_of(bits, data_type, integer)
    return None if found.removeprefix("u") == default.removeprefix("u") else found


def refuse(given: dict[str, tuple[Any, Any, str]]) -> None:
    """Refuse arguments that aren't at their defaults and can't be meant: name → (value, default, what to do).

    Raises:
        InputError: there is one.
    """
    for name, (value, default, instead) in given.items():
        if value is not default and (isinstance(value, Enum) or value != default):
            raise InputError(f"{name}={value!r} can't be meant here: {instead}")
