"""Scales in the number type that a file or kernel keeps them in, so that what is simulated is what is stored."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError

ScaleType = Literal["float16", "bfloat16", "float16+minimum"]
"""float16, bfloat16: the scale is such a number. float16+minimum: the group's minimum, ``-zero_point · scale``, which
is kept in place of the zero point, is a float16 number too (GGUF's Q4_1)."""

_TYPES: dict[str, tuple[int, int, float]] = {
    # name: (bits of the significand, exponent of the smallest number's lowest bit, largest number)
    "float16": (11, -24, 65504.0),
    "bfloat16": (8, -133, 3.3895313892515355e38),
}


def typed_scale(scale: NDArray[np.floating], kind: ScaleType, bits: int) -> NDArray[np.float32]:
    """The nearest scales of a type, half to even, never 0 and never infinite.

    With ``float16+minimum`` they have `bits` bits fewer, so that a product with any code of 0 to 2**bits - 1 is exact.

    Args:
        scale: > 0.
        kind: the type.
        bits: width of the codes.
    """
    name, _, minimum = kind.partition("+")
    precision, lowest, largest = _TYPES[name]
    if minimum:
        precision, largest = precision - bits, largest / 2**bits
        if precision < 1:
            raise InputError(f"codes of {bits} bits and their minimum have no room in {name}: at most 10 bits")
    value = np.asarray(scale, np.float64)
    _, exponents = np.frexp(value)  # value in [0.5, 1) · 2**exponent
    step = np.ldexp(1.0, np.maximum(exponents - precision, lowest))
    unit = np.ldexp(1.0, int(np.frexp(largest)[1]) - precision)
    return np.asarray(np.clip(np.rint(value / step) * step, np.ldexp(1.0, lowest), largest // unit * unit), np.float32)
