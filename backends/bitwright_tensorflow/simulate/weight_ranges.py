"""Min-max grids of weights as graph ops, bit-equal to the core's, for encodings that follow weights in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.grids import EPSILON, FLOAT_FORMATS, Blockwise, Encoding, Groups
from bitwright_tensorflow.simulate.fake_quant import NAMESPACE, Node


def min_max_numbers(weight: Node, form: Encoding, groups: Groups) -> tuple[Node, Node]:
    """Scale (float32, raw: before two-level rounding) and zero point (float32) of the grid that covers a weight.

    `encoding.encoding_from_range` in TensorFlow: float64 from the extremes on, so that both agree to the bit.

    Args:
        weight: float32, of shape `groups.shape`.
        form: an encoding of the wanted kind; its numbers aren't used, but for whether its grid is one-sided.
        groups: which elements share a scale.
    """
    cut = groups.cut(NAMESPACE, weight)
    low, high = (_reduced(reduce(cut, groups.axes), groups) for reduce in (tf.reduce_min, tf.reduce_max))
    low, high = tf.minimum(tf.cast(low, tf.float64), 0.0), tf.maximum(tf.cast(high, tf.float64), 0.0)
    if form.float_format is not None:
        scale = tf.maximum(-low, high) / _double(FLOAT_FORMATS[form.float_format][2])
        if not form.float_format.startswith("float8"):
            scale = tf.ones_like(scale)
        return tf.cast(tf.maximum(scale, EPSILON), tf.float32), tf.zeros_like(scale, tf.float32)
    grid, half = form.grid, 2 ** (form.bits - 1)
    zero = tf.zeros_like(high)
    if form.symmetric and one_sided(form):
        scale = high / _double(grid.steps)
    elif form.symmetric:
        scale = tf.maximum(high / _double(half - 1), -low / _double(half - int(form.strict)))
        zero += 0.0 if form.signed else float(half)
    else:
        scale = (high - low) / _double(grid.steps)
    scale = tf.cast(tf.maximum(scale, min(EPSILON, 0.01 / grid.steps)), tf.float32)
    if not form.symmetric:
        zero = tf.round(-low / tf.cast(scale, tf.float64)) + grid.qmin
        zero = tf.clip_by_value(zero, _double(grid.qmin), _double(grid.qmax))
    return scale, tf.cast(zero, tf.float32)


def _reduced(extremes: Node, groups: Groups) -> Node:
    return tf.transpose(extremes) if groups.swapped else extremes


def _double(value: float) -> Node:
    """A double whose value grappler can't see: it would multiply by its reciprocal where this divides."""
    hidden = tf.raw_ops.PlaceholderWithDefault(input=np.float64(value), shape=[])
    return hidden


def one_sided(form: Encoding) -> bool:
    """Whether a symmetric encoding stored unsigned uses 0..2**bits − 1 for data that are never negative."""
    return form.symmetric and not form.signed and not bool((form.zero_point != 0).any())


def two_level(scale: Node, form: Encoding) -> Node:
    """`encoding.two_level` in TensorFlow; scales of any other granularity as they are."""
    layout: Any = form.granularity
    if not isinstance(layout, Blockwise) or layout.decompressed_bits is None:
        return scale
    ratio = float(2 ** (layout.decompressed_bits - form.bits))
    # A power of two: multiplying by its reciprocal is exact.
    gamma = tf.reduce_max(scale, 1, keepdims=True) / ratio
    return tf.clip_by_value(tf.round(scale / gamma), 1.0, ratio) * gamma
