"""Weights that are so small that their grid, which can't be any finer, rounds all of them to zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Params
from bitwright.graph import ParamRole
from bitwright.grids import EPSILON, Encoding, EncodingTable, PerChannel
from bitwright.placement import Plan, SiteId

SHOWN = 3
"""Parameters that a warning names."""
NEGLIGIBLE = 2.0**-16
"""A channel that is so small beside the largest of its tensor (dead ones are common in trained networks) is lost in a
16-bit output too, so that nothing is said of it."""


def doubts_of_weights(plan: Plan, encodings: EncodingTable, params: Params) -> list[str]:
    """What speaks against weights: that all of a tensor, or of a channel beside others of its size, become zero.

    Args:
        plan: what is quantized.
        encodings: the grids.
        params: the values, read only where a scale is the least there is (`EPSILON`), or the type one of floats.
    """
    lost = {site: told for site in plan.parameters if (told := _lost(plan, site, encodings, params))}
    if not lost:
        return []
    shown = ", ".join(f"{site!r} ({told})" for site, told in list(lost.items())[:SHOWN])
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    return [
        f"the weights of {shown}{more} are smaller than their types can hold (scales end at {EPSILON:.2g}), and all "
        "become zero: scale them up, and what follows down, or keep them in float with overrides"
    ]


def _lost(plan: Plan, site: SiteId, encodings: EncodingTable, params: Params) -> str:
    """Which weights of a parameter are lost, in words; "" where none are."""
    encoding = encodings.get(site)
    if plan[site].role not in (ParamRole.WEIGHT, ParamRole.RECURRENT) or encoding is None:
        return ""
    # Scales end at EPSILON: where none has come to it, no weights are that small, and none are read. Types of floats
    # that have no scale can lose them too.
    if not encoding.scale.size or (encoding.float_format is None and float(encoding.scale.min()) > EPSILON):
        return ""
    values = params[site]
    sizes = _sizes(values, encoding)
    largest = float(sizes.max(initial=0.0))
    at_risk = (sizes > 0) & (sizes < EPSILON) & (sizes >= largest * NEGLIGIBLE)
    if not at_risk.any():
        return ""
    kept = _sizes(encoding.fake_quantize(values), encoding)
    gone = at_risk & (kept == 0)
    if not gone.any():
        return ""
    return f"no larger than {largest:.2g}" if not kept.any() else f"{int(gone.sum())} of {gone.size} channels"


def _sizes(values: NDArray[Any], encoding: Encoding) -> NDArray[np.float64]:
    """The largest magnitude of each channel with a scale of its own; of blocks and whole tensors, of all."""
    kind = encoding.granularity
    length = values.shape[kind.axis] if isinstance(kind, PerChannel) else 1
    rows = (np.moveaxis(values, kind.axis, 0) if isinstance(kind, PerChannel) else values).reshape(length, -1)
    high, low = rows.max(axis=1, initial=0.0), rows.min(axis=1, initial=0.0)
    return np.asarray(np.maximum(high, -low), np.float64)
