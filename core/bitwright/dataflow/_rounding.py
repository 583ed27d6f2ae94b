"""Fake quantization of activations in a compiled program: the kind of a grid is compiled, its numbers are fed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitwright.dataflow._namespace import FlowNamespace
from bitwright.grids import (
    CODE_TABLES,
    WIDE,
    Encoding,
    FloatFormat,
    Granularity,
    Groups,
    RunTimeGrid,
    largest_of,
    rounded,
    run_time_rounded,
)

Array = Any
"""An array of the framework."""


class Form(NamedTuple):
    """What of an encoding a program is compiled for.

    Attributes:
        granularity: which elements share a scale.
        float_format: of a float encoding.
        wide: more steps than float32 has whole numbers.
        run_time: the codes of a range at run time.
    """

    granularity: Granularity
    float_format: FloatFormat | None
    wide: bool
    run_time: RunTimeGrid | None = None

    @classmethod
    def of(cls, encoding: Encoding) -> Form:
        """That of an encoding."""
        wide = encoding.float_format is None and encoding.grid.steps >= WIDE
        return cls(encoding.granularity, encoding.float_format, wide, encoding.run_time)


Numbers = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Scale, and the ends of the grid as seen from its zero, float32, in the scale's shape; empty for a range at run time.
"""


def numbers_of(encoding: Encoding) -> Numbers:
    """What a program is fed of an encoding."""
    zero = encoding.zero_point.astype(np.float64)
    low, high = encoding.grid.qmin - zero, encoding.grid.qmax - zero
    return encoding.scale, np.asarray(low, np.float32), np.asarray(high, np.float32)


def fake_quantized(ns: FlowNamespace, x: Array, numbers: tuple[Array, Array, Array], form: Form) -> Array:
    """A tensor on its grid, bit-equal to `Encoding.fake_quantize`.

    Args:
        ns: the framework's functions.
        x: float32.
        numbers: of the framework, see `numbers_of`.
        form: the kind of grid.
    """
    if form.run_time is not None:
        return x if 0 in (ns.shape(x) or ()) else run_time_rounded(ns, x, form.run_time)
    groups = Groups.of(ns.shape(x), form.granularity)  # type: ignore[arg-type]
    scale, low, high = (groups.broadcast(ns, n) for n in numbers)
    cut = groups.cut(ns, x)
    if form.float_format is not None:
        y = cast(ns, cut / scale, form.float_format) * scale
    elif form.wide:
        q = ns.round(ns.float64(cut) / ns.float64(scale))
        y = ns.float32(ns.clip(q, ns.float64(low), ns.float64(high))) * scale
    else:
        y = rounded(ns, cut, scale, low, high)
    return groups.joined(ns, y)


def cast(ns: FlowNamespace, x: Array, format: FloatFormat) -> Array:
    """Divided float32 values in a float format, or table of values, and back."""
    if format in CODE_TABLES:
        return CODE_TABLES[format].rounded(ns, x)
    largest = largest_of(format)
    return ns.cast(ns.minimum(ns.maximum(x, -largest), largest), format)
