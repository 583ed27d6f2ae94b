"""Calibration: from what was seen of a tensor to the grid it gets; one small strategy class a scheme."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from bitwright.calibration._base import Scheme
from bitwright.calibration._entropy import Entropy
from bitwright.calibration._minmax import MinMax
from bitwright.calibration._mse import MeanSquaredError
from bitwright.calibration._percentile import Percentile
from bitwright.calibration._sqnr import Scores, Sqnr
from bitwright.grids import Encoding, QuantSpec, parse_scheme

_SCHEMES: dict[str, type[Scheme]] = {
    cls.name: cls for cls in (MinMax, Percentile, Sqnr, MeanSquaredError, Entropy, Scores)
}


def schemes() -> tuple[str, ...]:
    """Names of the calibration schemes."""
    return tuple(_SCHEMES)


def scheme(name: str | Scheme) -> Scheme:
    """A calibration scheme by name, with its setting after a colon: "sqnr", "percentile:99.9".

    AIMET's names "tf", "tf_enhanced" and "min_max" are understood. A `Scheme` object is returned as it is.

    Raises:
        InputError: unknown name, or a setting that the scheme doesn't take.
    """
    if isinstance(name, Scheme):
        return name
    key, setting = parse_scheme(name)
    return _SCHEMES[key](setting)


def calibrate_array(values: NDArray[Any], spec: QuantSpec, scheme_name: str | Scheme = "minmax") -> Encoding:
    """The encoding of a parameter in canonical layout, all its channels or blocks at once; LPBQ scales are two-level.

    Raises:
        EncodingError: the values are empty, NaN or infinite.
        InputError: unknown scheme, or axes and blocks that don't fit the shape.
    """
    return scheme(scheme_name).of_array(values, spec)
