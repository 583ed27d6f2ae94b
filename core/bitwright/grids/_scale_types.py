"""Scales in the number type that a file or kernel keeps them in, so that what is simulated is what is stored."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError

ScaleType = Literal["float16", "bfloat16", "float16+minimum", "float8e8m0", "float8e4m3fn"]
"""float16, bfloat16: the scale is such a number. float16+minimum: the group's minimum, ``-zero_point · scale``, which
is kept in place of the zero point, is a float16 number too (GGUF's Q4_1). float8e8m0: a power of two (OCP
Microscaling). float8e4m3fn: such a number times one float32 scale of the whole tensor (NVFP4)."""

_TYPES: dict[str, tuple[int, int, float]] = {
    # name: (bits of the significand, exponent of the smallest number's lowest bit, largest number)
    "float16": (11, -24, 65504.0),
    "bfloat16": (8, -133, 3.3895313892515355e38),
    "float8e8m0": (1, -126, 2.0**127),  # 2**-127 is left out: frameworks flush it to zero
    "float8e4m3fn": (4, -9, 448.0),
}


def typed_scale(
    scale: NDArray[np.floating], kind: ScaleType, bits: int, tensor_scale: float | None = None
) -> NDArray[np.float32]:
    """The nearest scales of a type, half to even, never 0 and never infinite.

    With ``float16+minimum`` they have `bits` bits fewer, so that a product with any code of 0 to 2**bits - 1 is exact.

    Args:
        scale: > 0.
        kind: the type.
        bits: width of the codes.
        tensor_scale: float32, what numbers of the type are multiplied with, in float32; None: with nothing.
    """
    name, _, minimum = kind.partition("+")
    precision, lowest, largest = _TYPES[name]
    if minimum:
        precision, largest = precision - bits, largest / 2**bits
        if precision < 1:
            raise InputError(f"codes of {bits} bits and their minimum have no room in {name}: at most 10 bits")
    value = np.asarray(scale, np.float64)
    if tensor_scale is not None:
        value = value / tensor_scale
    _, exponents = np.frexp(value)  # value in [0.5, 1) · 2**exponent
    step = np.ldexp(1.0, np.maximum(exponents - precision, lowest))
    unit = np.ldexp(1.0, int(np.frexp(largest)[1]) - precision)
    found = np.clip(np.rint(value / step) * step, np.ldexp(1.0, lowest), largest // unit * unit)
    return np.asarray(found if tensor_scale is None else np.float32(found) * np.float32(tensor_scale), np.float32)


def shared_exponent_scale(extreme: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    """The power of two of a block of floats: 2**(floor(log2 max |x|) − floor(log2 largest)).

    OCP Microscaling Formats v1.0, §6.3: what exceeds the largest element then saturates. Of blocks of zeros, any.

    Args:
        extreme: max |x| of each block.
        largest: magnitude of an element.
    """
    _, exponents = np.frexp(extreme)  # extreme in [0.5, 1) · 2**exponent
    return np.asarray(np.ldexp(1.0, np.clip(exponents - int(np.frexp(largest)[1]), -126, 127)), np.float64)


def tensor_scale_of(scale: NDArray[np.floating]) -> float:
    """The float32 scale of a tensor whose largest block then has the largest float8e4m3fn number for its own."""
    smallest = np.finfo(np.float32).tiny
    return float(np.maximum(np.float32(np.max(scale) / _TYPES["float8e4m3fn"][2]), smallest))
