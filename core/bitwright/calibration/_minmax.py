"""Min-max: the grid covers everything that was seen."""

from __future__ import annotations

from typing import ClassVar

from bitwright.calibration._base import Scheme
from bitwright.calibration._density import Density, Rows
from bitwright.errors import InputError
from bitwright.grids import QuantSpec

WIDEST = 16.0


class MinMax(Scheme):
    """The exact range of the data, or a multiple of it.

    At 16 bits a grid twice as wide costs 6 dB of some 80, and samples that calibration hasn't seen aren't clipped.

    Args:
        setting: the multiple, 1 to 16; default 1.
    """

    name = "minmax"
    extremes_only: ClassVar[bool] = True

    def __init__(self, setting: str | None = None) -> None:
        try:
            self.multiple = 1.0 if setting is None else float(setting)
        except ValueError:
            raise InputError(f"minmax:{setting}: write a number, for example minmax:1.5") from None
        if not 1 <= self.multiple <= WIDEST:
            raise InputError(f"minmax:{setting}: a multiple of the range lies between 1 and 16, for example 1.5")

    def range(self, data: Density, spec: QuantSpec) -> tuple[Rows, Rows]:
        """Smallest and largest value, times the multiple."""
        return data.minimum * self.multiple, data.maximum * self.multiple
