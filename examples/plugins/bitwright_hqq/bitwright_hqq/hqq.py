"""Half-quadratic quantization of weight scales (after Badri & Shaji, 2023, who search zero points in the same way).

The error of a weight is measured by Σ|w − ŵ|^p with p < 1, which leaves few large errors alone for the sake of the many
small ones. Auxiliary errors e split it into two steps that are solved in closed form, in turn: e shrinks towards
w − ŵ, and the scale is the least-squares fit of the codes to w − e.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from bitwright.backend import Capability
from bitwright.graph import Graph
from bitwright.grids import Encoding, fit_pairs, to_groups
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Outcome, Report, Settings, frozen_note


class HqqSettings(Settings):
    """How long to search.

    Attributes:
        p: exponent of the error's norm; below 1 it is robust against outliers.
        beta: weight of the auxiliary errors at first.
        growth: factor by which it grows with each iteration.
        iterations: of the two steps, from each start.
        starts: shares of the range that the search starts from; the first is what there is.
    """

    p: float = Field(0.7, gt=0, lt=1)
    beta: float = Field(10.0, gt=0)
    growth: float = Field(1.01, ge=1)
    iterations: int = Field(20, ge=1)
    starts: tuple[float, ...] = (1.0, 0.7, 0.5, 0.3)


class Hqq:
    """Chooses the scale of every weight, and keeps it: other techniques may search again."""

    name: ClassVar[str] = "hqq"
    Settings: ClassVar[type[Settings]] = HqqSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: HqqSettings) -> Iterable[Request]:
        """None: weights alone decide."""
        return ()

    def apply(self, ctx: Context[HqqSettings]) -> Outcome:
        """Search the scales of all weights that have an integer grid and aren't frozen."""
        found: dict[str, Encoding] = {}
        rows: list[tuple[str, float, float]] = []
        weights = dict.fromkeys(op.weight for op in ctx.graph.linear_ops if op.weight is not None)
        ctx.progress.start("Searching weight scales", len(weights))
        for id in weights:
            encoding = ctx.encodings.get(id)  # None where the plan leaves the weight in float
            if encoding is not None and searchable(encoding):
                weight = np.asarray(ctx.params[id])
                found[id] = search(weight, encoding, ctx.settings)
                before, after = (error(weight, e, ctx.settings.p) for e in (encoding, found[id]))
                rows.append((id, before, after))
            ctx.progress.advance(1, id)
        ctx.progress.finish()
        summary = f"{len(found)} weight scales searched" if found else "no weight scale to search"
        if note := frozen_note(ctx):
            summary += f"; {note}"
        figures = {"weights": float(len(found))}
        return Outcome(encodings=found, report=Report(summary, figures, ("weight", "before", "after"), tuple(rows)))


def searchable(encoding: Encoding) -> bool:
    """Whether the scales are numbers of their own: not of float formats, nor integer multiples (LPBQ), nor frozen."""
    return encoding.float_format is None and encoding.block_scale is None and encoding.bits <= 8 and not encoding.frozen


def search(weight: np.ndarray[Any, Any], encoding: Encoding, settings: HqqSettings) -> Encoding:
    """The encoding with the best scales of all iterations, in the norm of the settings; zero points stay.

    Args:
        weight: float values, canonical layout.
        encoding: where the search starts.
        settings: of the technique.
    """
    groups = to_groups(np.asarray(weight, np.float64), encoding.granularity)  # elements that share a scale come last
    zero = encoding.zero_point[..., None].astype(np.float64)
    low, high = encoding.grid.qmin - zero, encoding.grid.qmax - zero
    full = encoding.scale.astype(np.float64)
    best, least = full, np.full(full.shape, np.inf)
    for start in settings.starts:
        scale, beta = full * start, settings.beta
        for _ in range(settings.iterations + 1):
            codes = np.clip(np.rint(groups / scale[..., None]), low, high)
            errors = groups - codes * scale[..., None]
            norm = (np.abs(errors) ** settings.p).sum(axis=-1)
            best, least = np.where(norm < least, scale, best), np.minimum(norm, least)
            shrunk = np.abs(errors) - np.maximum(np.abs(errors), 1e-12) ** (settings.p - 1) / beta
            outliers = np.sign(errors) * np.maximum(shrunk, 0)
            power = np.square(codes).sum(axis=-1)
            fitted = (codes * (groups - outliers)).sum(axis=-1) / np.maximum(power, 1)
            scale = np.where((power > 0) & (fitted > 0), fitted, scale)
            beta *= settings.growth
    kept = encoding.with_(scale=best.astype(np.float32), kept=True, source="hqq")
    return fit_pairs(kept, weight)


def error(weight: np.ndarray[Any, Any], encoding: Encoding, p: float) -> float:
    """Σ|w − ŵ|^p."""
    return float((np.abs(np.asarray(weight, np.float64) - encoding.fake_quantize(weight)) ** p).sum())
