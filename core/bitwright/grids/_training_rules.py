"""How grids behave in training: one policy for every framework, over an array namespace.

In regular quantization-aware training activations keep their grids; a parameter's grid follows its values: in every
step, it is what min-max calibration would make of them. A grid that was chosen otherwise keeps its ratio to the
min-max one. In range learning, scale = `scale` · exp(`log_scale`) and zero point = `zero_point` + `zero_shift` ·
steps. Both start at 0, so that the start is bit-equal and one learning rate suits grids of all sizes. Zero points at
an end of the codes (behind a ReLU) and those of symmetric grids stay.

Frozen grids, float formats without a scale, blocks of floats whose scales have a number type of their own, ranges at
run time and derived grids (of biases: they follow from others) neither follow nor learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.grids._encoding import Encoding
from bitwright.grids._encoding import two_level as two_level_encoding
from bitwright.grids._gradients import Array
from bitwright.grids._min_max import two_level_scales
from bitwright.grids._range_numbers import RangeNamespace

UNSCALED = frozenset({"float16", "bfloat16"})
"""Float formats without a scale."""
UNSET = Encoding(8, False, False, np.ones((), np.float32), np.zeros((), np.int32))
"""Stands in where a site has no encoding yet."""


class TrainingNamespace(RangeNamespace, Protocol):
    """What grids in training need of a framework beside `RangeNamespace`."""

    def exp(self, x: Array, /) -> Array:
        """e to the power of x."""

    def stop(self, x: Array, /) -> Array:
        """x, without a gradient."""


@dataclass(frozen=True, slots=True)
class GridPolicy:
    """What training does with one site's grid.

    Attributes:
        learns: its scale is trained.
        moves: its zero point is trained, where it lies inside of the codes.
        follows: it follows the parameter's values.
    """

    learns: bool
    moves: bool
    follows: bool

    @classmethod
    def of(
        cls, encoding: Encoding | None, *, parameter: bool, range_learning: bool, derived: bool = False
    ) -> GridPolicy:
        """The policy for a site.

        Args:
            encoding: in force when training starts; None for a bypassed site.
            parameter: the site is one.
            range_learning: scales and zero points are trained.
            derived: the encoding follows from others (`plan.Derived`).
        """
        fixed = encoding is None or encoding.frozen or encoding.float_format in UNSCALED or derived
        fixed = fixed or (encoding is not None and encoding.run_time is not None)
        fixed = fixed or (encoding is not None and None not in (encoding.float_format, encoding.scale_type))
        learns = range_learning and not fixed
        moves = False
        if learns and encoding is not None:
            inside = moving(encoding)
            moves = not encoding.symmetric and encoding.float_format is None and bool(inside.any())
        return cls(learns, moves, parameter and not range_learning and not fixed)


def moving(encoding: Encoding) -> NDArray[np.bool_]:
    """Which zero points may move: those inside of the codes."""
    grid = encoding.grid
    return np.asarray((encoding.zero_point > grid.qmin) & (encoding.zero_point < grid.qmax))


def ratio_to(ns: RangeNamespace, scale: Array, base: Array) -> Array:
    """The ratio (float64) of an encoding's scales to the min-max ones of the same values, which training keeps.

    Args:
        ns: the framework's functions.
        scale: float32, of the encoding.
        base: float32, min-max scales after two-level rounding.
    """
    return ns.float64(scale) / ns.float64(base)


def followed(
    ns: TrainingNamespace, base: Array, zero: Array, ratio: Array, stored: Array, form: Encoding
) -> tuple[Array, Array]:
    """Scale and zero point of a grid that follows a parameter; no gradient flows through them.

    Args:
        ns: the framework's functions.
        base, zero: min-max scale (float32, after two-level rounding) and zero point of the present values.
        ratio: float64, see `ratio_to`.
        stored: the encoding's own zero point, kept where the ratio isn't 1; of zero's type.
        form: the kind of grid.
    """
    scale = two_level_scales(ns, ns.float32(ns.float64(base) * ratio), form)
    plain = (ratio >= 1.0) & (ratio <= 1.0)  # graphs of TensorFlow 1 have no == of values
    return ns.stop(scale), ns.stop(ns.where(plain, zero, stored))


def learned_scale(ns: TrainingNamespace, scale: Array, log_scale: Array, form: Encoding) -> Array:
    """The scale in force where it is learned; two-level scales are rounded, straight through."""
    exact = scale * ns.exp(log_scale)
    snapped = two_level_scales(ns, exact, form)
    # The value is the rounded one to the bit, as x − x is 0; the gradient the exact one's.
    return exact if snapped is exact else ns.stop(snapped) + (exact - ns.stop(exact))


def learned_zero(ns: TrainingNamespace, zero: Array, shift: Array, qmin: Array | float, qmax: Array | float) -> Array:
    """The zero point in force where it is learned: whole, within the codes, rounding passed straight through.

    Args:
        ns: the framework's functions.
        zero: the encoding's, float.
        shift: trained, in units of the grid's width.
        qmin, qmax: the codes' ends.
    """
    moved = zero + shift * (qmax - qmin)
    snapped = ns.minimum(ns.maximum(ns.round(moved), qmin), qmax)
    return ns.where((zero > qmin) & (zero < qmax), ns.stop(snapped) + (moved - ns.stop(moved)), zero)


def present(form: Encoding, scale: NDArray[np.floating], zero_point: NDArray[np.floating], learns: bool) -> Encoding:
    """The encoding for a site's numbers as they are now; the one that was installed where they haven't changed.

    Args:
        form: the encoding that was installed.
        scale, zero_point: read off the device.
        learns: they are trained: what has changed is frozen, as the weights were trained for it.
    """
    codes = np.rint(zero_point).astype(np.int32)
    if np.array_equal(scale, form.scale) and np.array_equal(codes, form.zero_point):
        return form
    found = form.with_(scale=scale, zero_point=codes, block_scale=None)
    if learns and not form.frozen:
        found = found.with_(source="range learning", frozen=True)
    return two_level_encoding(found)
