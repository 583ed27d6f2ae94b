"""The base of all calibration schemes: it checks what goes in and comes out, a scheme has only its formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bitwright.calibration._density import SEARCH_PRECISION, Density, Rows
from bitwright.calibration._room import ROOM_BITS, multiples
from bitwright.errors import EncodingError, InputError
from bitwright.grids import (
    Blockwise,
    Encoding,
    PerChannel,
    PerTensor,
    QuantSpec,
    encoding_from_range,
    fit_pairs,
    scale_shape,
    to_groups,
    two_level,
)
from bitwright.statistics import HistogramStatistic, RangeStatistic, Statistic


class Scheme(ABC):
    """How the range of a grid is chosen from the values that will be put on it.

    A scheme of your own defines `name` and `range`, and sets the class attributes where it needs more or less.

    Attributes:
        name: as users write it, and the source that encodings carry.
        extremes_only: smallest and largest value are enough, so that statistics are reduced inside the graph.
        extremes_from: bits from which all that was seen is on the grid, since nothing that a finer one could gain is
            worth clipping; activations of 15 bits and more have room beside it then, where codes are to spare.
        keeps_top: the largest value of all must be known, also where a histogram counts some values only.
        precision: mantissa bits of the histograms it is calibrated on; None takes the histogram's own default.
        view: mantissa bits of the bins that `range` sees.
    """

    name: ClassVar[str]
    extremes_only: ClassVar[bool] = False
    extremes_from: ClassVar[int] = 33
    keeps_top: ClassVar[bool] = False
    precision: ClassVar[int | None] = None
    view: ClassVar[int] = SEARCH_PRECISION

    def __init__(self, setting: str | None = None) -> None:
        if setting is not None:
            raise InputError(f"calibration scheme {self.name!r} takes no setting, got {setting!r}")

    @abstractmethod
    def range(self, data: Density, spec: QuantSpec) -> tuple[Rows, Rows]:
        """Low and high end of each row's grid, (rows,); zero is included afterwards."""

    def statistic(self, spec: QuantSpec) -> Callable[[], Statistic]:
        """What builds the empty statistic that `encoding` wants for an activation.

        Raises:
            InputError: activations can't be quantized in blocks.
        """
        axis = None
        if isinstance(spec.granularity, PerChannel):
            axis = spec.granularity.axis
        elif isinstance(spec.granularity, Blockwise):
            raise InputError("activations are quantized per tensor or per channel, not in blocks")
        if self._extremes(spec) and not self.makes_room(spec):
            return partial(RangeStatistic, axis)
        return partial(HistogramStatistic, axis, precision=self.precision)

    def encoding(self, statistic: Statistic, spec: QuantSpec) -> Encoding:
        """The encoding of an activation.

        Raises:
            EncodingError: the statistic has seen no data, or is of another kind or granularity.
        """
        data = Density.of_statistic(statistic, self.view)
        channels = isinstance(spec.granularity, PerChannel)
        if channels != (getattr(statistic, "axis", None) is not None):
            raise EncodingError(f"a statistic over axis {statistic.axis} for a {type(spec.granularity).__name__} grid")
        if data.low.shape[1] == 0 and not self._extremes(spec):
            raise EncodingError(f"{self.name} calibration needs a histogram, got only a range")
        return self._encode(data, spec, (len(data.minimum),) if channels else (), room=self.makes_room(spec))

    def makes_room(self, spec: QuantSpec) -> bool:
        """Whether an activation's grid may be wider than what was seen, for samples to come; then a histogram tells
        whether it has the codes for that."""
        one = isinstance(spec.granularity, PerTensor)
        free = spec.float_format is None and spec.minimum is None and spec.maximum is None
        return one and free and spec.bits >= max(self.extremes_from, ROOM_BITS)

    def keeps_ends(self, spec: QuantSpec) -> bool:
        """Whether an activation's grid ends where all values do, also where a histogram counts some values only."""
        return self.keeps_top or self.makes_room(spec)

    def of_array(self, values: NDArray[Any], spec: QuantSpec) -> Encoding:
        """The encoding of given values in canonical layout: every scale of a weight at once, exact on the values.

        Raises:
            EncodingError: the values are empty, NaN or infinite.
            InputError: the specification's axes or blocks don't fit the shape.
        """
        tensor = np.asarray(values, np.float32)
        if tensor.size == 0:
            raise EncodingError(f"there is nothing to calibrate in an array of shape {tensor.shape}")
        shape = scale_shape(tensor.shape, spec.granularity)
        rows = np.asarray(to_groups(tensor, spec.granularity), np.float32).reshape(int(np.prod(shape)), -1)
        data = Density.of_range(rows)
        if not (np.isfinite(data.minimum).all() and np.isfinite(data.maximum).all()):
            raise EncodingError("the values hold NaN or infinity; check the model's parameters")
        if not self._extremes(spec):
            data = Density.of_values(rows, self.precision or self.view)
        return fit_pairs(self._encode(data, spec, shape), tensor)

    def _extremes(self, spec: QuantSpec) -> bool:
        """Whether smallest and largest value decide: for this scheme, or because the specification leaves no choice."""
        # A scaled float format maps the largest magnitude to its largest number; the others have no scale at all.
        pinned = spec.minimum is not None and spec.maximum is not None
        enough = self.extremes_only or spec.bits >= self.extremes_from
        return enough or pinned or spec.float_format is not None

    def _encode(self, data: Density, spec: QuantSpec, shape: tuple[int, ...], *, room: bool = False) -> Encoding:
        left = self._extremes(spec) and not self.extremes_only  # nothing is left to choose
        low, high = (data.minimum, data.maximum) if left else self.range(data, spec)
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if low.shape != data.minimum.shape or high.shape != data.minimum.shape:
            raise EncodingError(f"{self.name}: {low.shape} and {high.shape} for {data.minimum.shape} groups")
        if room and data.low.shape[1]:
            wider = multiples(data, low, high, spec)
            low, high = low * wider, high * wider
        return two_level(encoding_from_range(spec, low.reshape(shape), high.reshape(shape), source=self.name))
