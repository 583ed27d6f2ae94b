"""MSE: the grid with the least mean squared error."""

from __future__ import annotations

from typing import ClassVar

from bitwright.calibration._base import Scheme
from bitwright.calibration._density import Density, Rows
from bitwright.calibration._search import FINE_BITS, least_squares_range
from bitwright.grids import QuantSpec


class MeanSquaredError(Scheme):
    """Rounding and saturation error count alike. A lone huge value is kept, however rare: see `Sqnr`.

    From `FINE_BITS` on it is min-max, whose error is the same.
    """

    name = "mse"
    extremes_from: ClassVar[int] = FINE_BITS

    def range(self, data: Density, spec: QuantSpec) -> tuple[Rows, Rows]:
        """The least-squares range."""
        return least_squares_range(data, spec)
