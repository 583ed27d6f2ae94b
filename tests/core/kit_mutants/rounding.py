"""Backends that round otherwise."""

from __future__ import annotations

import numpy as np

from bitwright.grids import cast_float
from kit_mutants.base import ACTIVATIONS, GRID, WEIGHTS, computed, encoded


def integers(encoding):
    return encoding.float_format is None and encoding.bits <= 16


def _codes(e, x, rounded, low=0, high=0):
    scale, zero = e.spread(x.shape)
    codes = np.clip(rounded(np.divide(x, scale, dtype=np.float32)) + zero, e.grid.qmin + low, e.grid.qmax + high)
    return (codes - zero) * scale


computed(
    "rounds half up", "cnn", lambda e, x: _codes(e, x, lambda r: np.floor(r + np.float32(0.5))), GRID, when=integers
)
computed("rounds towards zero", "cnn", lambda e, x: _codes(e, x, np.trunc), GRID, when=integers)
computed("upper end off by one", "cnn", lambda e, x: _codes(e, x, np.rint, high=1), GRID, when=integers)
computed("lower end off by one", "cnn", lambda e, x: _codes(e, x, np.rint, low=1), GRID, when=integers)
computed(
    "the lowest code of a strict grid is used",
    "cnn",
    lambda e, x: _codes(e, x, np.rint, low=-1),
    GRID,
    when=lambda e: integers(e) and e.strict,
)


def _reciprocal(e, x):
    scale, zero = e.spread(x.shape)
    codes = np.clip(np.rint(x * (np.float32(1) / scale)) + zero, e.grid.qmin, e.grid.qmax)
    return (codes - zero) * scale


def _wide(e, x):
    scale, zero = e.spread(x.shape)
    codes = np.clip(np.rint(x.astype(np.float64) / scale) + zero, e.grid.qmin, e.grid.qmax)
    return (codes - zero).astype(np.float32) * scale


def _negated_zero(e, x):
    scale, zero = e.spread(x.shape)
    codes = np.clip(np.rint(x / scale) - zero, e.grid.qmin, e.grid.qmax)
    return (codes + zero) * scale


computed("multiplies by 1/scale", "cnn", _reciprocal, GRID, when=integers)
computed("divides in float64", "cnn", _wide, GRID, when=integers)
computed("the zero point's sign is turned", "cnn", _negated_zero, GRID, when=integers)
computed("the zero point is ignored", "cnn", lambda e, x: e.with_(zero_point=0 * e.zero_point).dequantize(
    e.with_(zero_point=0 * e.zero_point).quantize(x)), GRID, when=integers)  # fmt: skip


def narrowed(site, e):
    if not integers(e) or e.bits != 16:
        return e
    return e.with_(bits=8, zero_point=np.right_shift(e.zero_point, 8), scale=e.scale * np.float32(256))


encoded("16 bits are 8", "cnn", narrowed, GRID, WEIGHTS)


def as_float(format):
    return lambda e: e.float_format == format


def is_fp8(encoding):
    return encoding.float_format is not None and encoding.float_format.startswith("float8")


def plain(e, x):
    return x


computed("float16 is ignored", "cnn", plain, ACTIVATIONS, when=as_float("float16"))
computed("bfloat16 is ignored", "cnn", plain, WEIGHTS, when=as_float("bfloat16"))
computed("fp8 is ignored", "cnn", plain, ACTIVATIONS, when=is_fp8)
computed("fp8 weights are ignored", "cnn", plain, WEIGHTS, when=is_fp8)
computed(
    "bfloat16 is cut off instead of rounded",
    "cnn",
    lambda e, x: (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
    GRID,
    when=as_float("bfloat16"),
)
computed(
    "one fp8 format is the other",
    "cnn",
    lambda e, x: cast_float(x, "float8e4m3fn", e.spread(x.shape)[0]),
    ACTIVATIONS,
    when=as_float("float8e5m2"),
)
computed("fp8's scale is ignored", "cnn", lambda e, x: cast_float(x, e.float_format), GRID, when=is_fp8)


def _overflowing(e, x):
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _flushed(e, x):
    y = cast_float(x, e.float_format, e.spread(x.shape)[0])
    smallest = 2.0 ** (-6 if e.float_format == "float8e4m3fn" else -14) * e.spread(x.shape)[0]
    return np.where(np.abs(y) < smallest, 0, y)


computed("float16 overflows to infinity", "cnn", _overflowing, GRID, when=as_float("float16"))
computed("fp8 has no subnormal numbers", "cnn", _flushed, GRID, when=is_fp8)
