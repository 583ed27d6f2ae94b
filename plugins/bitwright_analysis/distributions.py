"""Histograms and ranges of every quantized site, with the grid that was chosen for it."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Params, Session, Tap
from bitwright.calibration import collect
from bitwright.data import Dataset
from bitwright.graph import Graph, Op, ParamRole
from bitwright.grids import Encoding, PerChannel, PerTensor, fixed_layout, to_groups
from bitwright.placement import Plan, SiteId, SiteKind
from bitwright.progress import Progress
from bitwright.report import describe
from bitwright.statistics import HistogramStatistic, RangeStatistic, Request, Source
from bitwright_analysis.records import Distribution
from bitwright_analysis.sweeps import layer_of

BINS = 128
TYPICAL = 0.999
COUNTED = 2**16
"""Values of each sample that a histogram counts, or somewhat fewer, where a tensor has so many; ranges are of all."""


def parameter_distributions(
    graph: Graph, plan: Plan, table: dict[SiteId, Encoding], params: Params
) -> list[Distribution]:
    """Every quantized parameter but derived biases, in the order of the network."""
    found = []
    for site in plan.parameters:
        if site in table:
            op = graph.users(site)[0] if graph.users(site) else None
            role = plan[site].role
            found.append(_parameter(site, op, role, table[site], np.asarray(params[site])))
    return found


def _parameter(
    site: SiteId, op: Op | None, role: ParamRole | None, encoding: Encoding, values: NDArray[np.float32]
) -> Distribution:
    scale, zero = encoding.spread(values.shape)
    integer = encoding.float_format is None
    single = encoding.scale.ndim == 0
    layout = fixed_layout(encoding.granularity)
    axis = 0 if isinstance(layout, PerTensor) else layout.axis
    groups = to_groups(values, PerChannel(axis)) if values.ndim else values.reshape(1, 1)
    seen = values if single or not integer else values / scale
    low, high = float(seen.min()), float(seen.max())
    counts, edges = np.histogram(seen, BINS, span_of(low, high))
    clipped = 0.0
    if integer:
        steps = np.rint(values / scale) + zero
        clipped = float(((steps < encoding.grid.qmin) | (steps > encoding.grid.qmax)).mean())
    return Distribution(
        site=site,
        kind="weight" if role is ParamRole.WEIGHT else "parameter",
        op="" if op is None else op.id,
        type="" if op is None else op.type,
        low=float(values.min()),
        high=float(values.max()),
        typical=float(np.quantile(np.abs(values), TYPICAL)),
        clipped=clipped,
        unit="value" if single or not integer else "code",
        first=float(edges[0]),
        width=float(edges[1] - edges[0]),
        counts=tuple(counts.tolist()),
        channel_low=tuple(groups.min(axis=1).tolist()),
        channel_high=tuple(groups.max(axis=1).tolist()),
        **_grid(encoding, in_codes=not single),
    )


def _grid(encoding: Encoding, *, in_codes: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "grid": describe(encoding),
        "grid_low": None,
        "grid_high": None,
        "step_smallest": float(encoding.scale.min()) if encoding.scale.size else None,
        "step_largest": float(encoding.scale.max()) if encoding.scale.size else None,
    }
    if not encoding.is_fixed:
        return figures
    figures |= {"grid_low": float(encoding.minimum.min()), "grid_high": float(encoding.maximum.max())}
    first = encoding.grid.qmin - int(encoding.zero_point.reshape(-1)[0])
    step = 1.0 if in_codes else float(encoding.scale)
    if in_codes and len(np.unique(encoding.zero_point)) > 1:
        return figures
    codes = encoding.grid.steps + 1
    return {**figures, "grid_first": first * step, "grid_step": step, "grid_codes": codes}


def activation_distributions(
    backend: Backend[Any],
    model: Any,
    graph: Graph,
    plan: Plan,
    table: dict[SiteId, Encoding],
    data: Dataset,
    progress: Progress,
) -> list[Distribution]:
    """Every quantized activation, in the float network, in the order of the network."""
    sites = [s for s in plan.quantized if plan[s].kind is SiteKind.ACTIVATION and s in table and s in graph.tensors]
    requests = []
    for site in sites:
        step = thinning(graph.tensors[site].shape)
        axis = graph.tensors[site].channel_axis
        memory = HistogramStatistic.bytes_for()
        requests.append(Request(f"values\0{site}", (site,), lambda s=step: HistogramStatistic(step=s), memory=memory))  # type: ignore[misc]
        requests.append(Request(f"range\0{site}", (site,), RangeStatistic))
        if axis is not None:
            requests.append(Request(f"channels\0{site}", (site,), lambda a=axis: RangeStatistic(a)))  # type: ignore[misc]
    if not requests:
        return []

    def open_session(source: Source, taps: Sequence[Tap]) -> Session:
        return backend.session(model, taps)

    statistics: dict[str, Any] = collect(requests, open_session, data, progress=progress)
    return [
        _activation(
            site,
            layer_of(graph, plan, site),
            table[site],
            statistics[f"values\0{site}"],
            statistics[f"range\0{site}"],
            statistics.get(f"channels\0{site}"),
        )
        for site in sites
    ]


def _activation(
    site: SiteId,
    op: Op | None,
    encoding: Encoding,
    values: HistogramStatistic,
    span: RangeStatistic,
    channels: RangeStatistic | None,
) -> Distribution:
    low, high = float(span.low), float(span.high)
    first, last = span_of(low, high)
    edges = np.linspace(first, last, BINS + 1)
    reached = cumulative(values, edges)
    clipped = 0.0
    if encoding.is_fixed:
        ends = np.array(
            [encoding.minimum.min() - encoding.scale.min() / 2, encoding.maximum.max() + encoding.scale.min() / 2]
        )
        below, within = cumulative(values, ends.astype(np.float64))
        clipped = float(1 - (within - below))
    known = channels is not None and channels.low.ndim == 1
    single = encoding.scale.ndim == 0
    grid = (
        _grid(encoding, in_codes=False)
        if single
        else {**_grid(encoding, in_codes=True), "grid_first": None, "grid_step": None, "grid_codes": None}
    )
    return Distribution(
        site=site,
        kind="activation",
        op="" if op is None else op.id,
        type="" if op is None else op.type,
        low=low,
        high=high,
        typical=_typical(values),
        clipped=max(0.0, clipped),
        unit="value",
        first=first,
        width=(last - first) / BINS,
        counts=tuple(np.rint(np.diff(reached) * int(values.total.sum())).astype(int).tolist()),
        channel_low=tuple(channels.low.tolist()) if known and channels is not None else (),
        channel_high=tuple(channels.high.tolist()) if known and channels is not None else (),
        **grid,
    )


def span_of(low: float, high: float) -> tuple[float, float]:
    """A range of some width, for values that may all be equal."""
    return (low, high) if high > low else (low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2)


def cumulative(values: HistogramStatistic, at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the values at or below each point; within a bin they are taken to be spread evenly."""
    bins = values.bins()
    ends, counts = np.asarray(bins.high[0]), np.asarray(bins.count[0])
    starts, total = np.asarray(bins.low[0]), max(float(counts.sum()), 1.0)
    before = np.concatenate([[0.0], np.cumsum(counts)])
    index = np.searchsorted(ends, at, side="right")
    inside = np.minimum(index, len(ends) - 1)
    width = ends[inside] - starts[inside]
    part = np.clip(np.divide(at - starts[inside], width, out=np.zeros(len(at)), where=width > 0), 0.0, 1.0)
    found = before[index] + np.where(index < len(ends), part * counts[inside], 0.0)
    # The lowest value belongs to the first bin although nothing lies below it.
    return np.asarray(np.where(at <= starts[0], 0.0, found) / total)


def _typical(values: HistogramStatistic) -> float:
    """The magnitude that `TYPICAL` of the values don't exceed (to a bin's width)."""
    bins = values.bins()
    size = np.maximum(np.abs(bins.low[0]), np.abs(bins.high[0]))
    order = np.argsort(size)
    reached = np.cumsum(bins.count[0][order])
    return float(size[order][min(int(np.searchsorted(reached, TYPICAL * reached[-1])), len(size) - 1)])


def thinning(shape: tuple[int | None, ...] | None) -> int:
    """Count every n-th value of a sample; no divisor in common with any dimension, so that all are met alike."""
    if shape is None or len(shape) < 2 or None in shape[1:]:
        return 1
    sizes = [d for d in shape[1:] if d is not None]
    step = max(1, int(np.prod(sizes, dtype=np.int64)) // COUNTED)
    while step > 1 and any(gcd(step, d) > 1 for d in sizes):
        step += 1
    return step
