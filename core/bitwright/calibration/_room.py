"""Room beside what calibration has seen, where a grid has codes to spare."""

from __future__ import annotations

import numpy as np

from bitwright.calibration._density import Density, Rows
from bitwright.grids import QuantSpec

ROOM = 2.0
"""Largest multiple of the range that was seen."""

STEPS = 2**11
"""Steps that the mean magnitude keeps where a grid is made wider: 77 dB for a value of that size."""

ROOM_BITS = 15
"""Bits from which a grid may have room: of fewer codes hardly any distribution leaves some to spare."""


def multiples(data: Density, low: Rows, high: Rows, spec: QuantSpec) -> Rows:
    """By how much a grid over [low, high] may be wider than that, 1 to `ROOM`, (rows,).

    The range of finitely many samples is no bound of the next ones: of 16 images, the largest of 10 normal logits is
    passed by one in a dozen images, and a value that is clipped by a tenth of the range has an error of thousands of
    steps at 16 bits. A wider grid costs little there, up to 6 dB of some 90: as long as the mean magnitude of the
    values that aren't zero keeps `STEPS` steps. Where a few values are far larger than the others (massive activations
    of language models), codes are short at 16 bits too, and the grid ends where the values did.
    """
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    span = high - low
    if spec.symmetric:
        signed = 2 * np.maximum(-low, high)
        span = np.where(low < 0, signed, high if spec.unsigned_symmetric else signed)
    size = data.magnitude
    mass = np.where(size > 0, data.mass, 0.0)
    mean = (size * mass).sum(axis=1) / np.maximum(mass.sum(axis=1), 1.0)
    affordable = spec.grid.steps * mean / STEPS
    return np.asarray(np.clip(affordable / np.where(span > 0, span, 1.0), 1.0, ROOM))
