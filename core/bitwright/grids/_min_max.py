"""Min-max grids of weights over an array namespace, for encodings that follow weights in training.

Bit-equal to what calibration makes of the same values (`encoding.encoding_of_weights`): the arithmetic is the same
(`range_numbers`). An adapter for a framework is a dozen one-liners.
"""

from __future__ import annotations

from bitwright.grids._encoding import Encoding
from bitwright.grids._gradients import Array, Groups
from bitwright.grids._grid import Blockwise
from bitwright.grids._range_numbers import GridKind, RangeNamespace, range_numbers, two_level_factors


def one_sided(form: Encoding) -> bool:
    """Whether a symmetric encoding stored unsigned uses 0..2**bits − 1 for data that are never negative."""
    return form.symmetric and not form.signed and not bool((form.zero_point != 0).any())


def min_max_numbers(ns: RangeNamespace, cut: Array, form: Encoding, groups: Groups) -> tuple[Array, Array]:
    """Scale (float32, raw: before two-level rounding) and zero point (float64) of the grid that covers a weight.

    Args:
        ns: the framework's functions.
        cut: the weight, float32, in the groups' `split` shape (`Groups.cut`).
        form: an encoding of the wanted kind; its numbers aren't used, but for whether its grid is one-sided.
        groups: which elements share a scale.
    """
    low = high = cut
    if groups.axes:
        low, high = ns.lowest(cut, groups.axes), ns.highest(cut, groups.axes)
    if groups.swapped:
        low, high = ns.transpose(low, (1, 0)), ns.transpose(high, (1, 0))
    kind = GridKind(form.bits, form.signed, form.symmetric, form.strict, form.float_format, one_sided(form))
    return range_numbers(ns, ns.minimum(ns.float64(low), 0.0), ns.maximum(ns.float64(high), 0.0), kind)


def two_level_scales(ns: RangeNamespace, scale: Array, form: Encoding) -> Array:
    """`encoding.two_level` of scales in a framework; those of any other granularity as they are."""
    layout = form.granularity
    if not isinstance(layout, Blockwise) or layout.decompressed_bits is None:
        return scale
    ratio = 2 ** (layout.decompressed_bits - form.bits)
    factors, gamma = two_level_factors(ns, scale, form.scale.shape[0], ratio)
    return factors * gamma


def min_max_grid(ns: RangeNamespace, cut: Array, form: Encoding, groups: Groups) -> tuple[Array, Array]:
    """Scale (float32, after two-level rounding) and zero point (float64) of the grid that covers a weight.

    Args:
        ns, cut, form, groups: see `min_max_numbers`.
    """
    scale, zero = min_max_numbers(ns, cut, form, groups)
    return two_level_scales(ns, scale, form), zero
