"""Min-max grids of weights on the device, bit-equal to the core's, for encodings that follow weights in training."""

from __future__ import annotations

from typing import Any

from keras import ops

from bitwright.grids import EPSILON, FLOAT_FORMATS, Blockwise, Encoding, Groups
from bitwright_keras.simulate.rounding import NAMESPACE


def min_max_scale(cut: Any, groups: Groups, form: Encoding) -> tuple[Any, Any]:
    """Scale (raw: before two-level rounding) and zero point, both float32, of the grid that covers a weight.

    `encoding.encoding_from_range` in keras.ops: float64 from the extremes on, so that both agree to the bit.

    Args:
        cut: the weight, in the groups' `split` shape.
        groups: which elements share a scale.
        form: an encoding of the wanted kind; its numbers aren't used, but for whether its grid is one-sided.
    """
    low, high = cut, cut
    if groups.axes:
        low, high = ops.min(cut, axis=groups.axes), ops.max(cut, axis=groups.axes)
    if groups.swapped:
        low, high = NAMESPACE.transpose(low, (1, 0)), NAMESPACE.transpose(high, (1, 0))
    low = ops.minimum(ops.cast(low, "float64"), 0.0)
    high = ops.maximum(ops.cast(high, "float64"), 0.0)
    if form.float_format is not None:
        largest = FLOAT_FORMATS[form.float_format][2]
        scale = ops.maximum(-low, high) / largest
        if not form.float_format.startswith("float8"):
            scale = ops.ones_like(scale)
        return ops.cast(ops.maximum(scale, EPSILON), "float32"), ops.cast(ops.zeros_like(scale), "float32")
    grid, half = form.grid, 2 ** (form.bits - 1)
    zero = ops.zeros_like(high)
    if form.symmetric and one_sided(form):
        scale = high / grid.steps
    elif form.symmetric:
        scale = ops.maximum(high / (half - 1), -low / (half - int(form.strict)))
        zero = zero + (0 if form.signed else half)
    else:
        scale = (high - low) / grid.steps
    scale = ops.cast(ops.maximum(scale, min(EPSILON, 0.01 / grid.steps)), "float32")
    if not form.symmetric:
        zero = ops.round(-low / ops.cast(scale, "float64")) + grid.qmin
        zero = ops.minimum(ops.maximum(zero, float(grid.qmin)), float(grid.qmax))
    return scale, ops.cast(zero, "float32")


def one_sided(form: Encoding) -> bool:
    """Whether a symmetric encoding stored unsigned uses 0..2**bits − 1 for data that are never negative."""
    return form.symmetric and not form.signed and not bool((form.zero_point != 0).any())


def two_level_scale(scale: Any, form: Encoding) -> Any:
    """`encoding.two_level` in keras.ops; scales of any other granularity as they are."""
    layout = form.granularity
    if not isinstance(layout, Blockwise) or layout.decompressed_bits is None:
        return scale
    ratio = 2 ** (layout.decompressed_bits - form.bits)
    gamma = ops.max(scale, axis=1, keepdims=True) / ratio
    return ops.clip(ops.round(scale / gamma), 1, ratio) * gamma
