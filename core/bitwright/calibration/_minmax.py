"""Min-max: the grid covers everything that was seen."""

from __future__ import annotations

from typing import ClassVar

from bitwright.calibration._base import Scheme
from bitwright.calibration._density import Density, Rows
from bitwright.grids import QuantSpec


class MinMax(Scheme):
    """The exact range of the data."""

    name = "minmax"
    extremes_only: ClassVar[bool] = True

    def range(self, data: Density, spec: QuantSpec) -> tuple[Rows, Rows]:
        """Smallest and largest value."""
        return data.minimum, data.maximum
