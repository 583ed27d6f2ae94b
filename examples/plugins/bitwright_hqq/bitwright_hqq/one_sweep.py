"""Roundings chosen one after the other on the moments of a layer's input: one sweep of coordinate descent.

Frantar et al. (2022, "GPTQ") visit the columns of a weight in order and spread each one's error over those that follow.
Here a column's error stays where it is, and each column takes the code that is best for what the others are now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from bitwright.backend import Capability
from bitwright.graph import Graph, from_matrix, to_matrix
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Layer, LayerResult, LayerwiseSettings, Outcome, Report, walk_of
from bitwright_hqq.hqq import searchable


class OneSweep:
    """Chooses the codes of every weight by its layer's output error."""

    name: ClassVar[str] = "one_sweep"
    Settings: ClassVar[type[LayerwiseSettings]] = LayerwiseSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: LayerwiseSettings) -> Iterable[Request]:
        """None: the walk collects what each layer needs."""
        return ()

    def needs_data(self, settings: LayerwiseSettings) -> bool:
        """Always, though `statistics` asks for none: so that users are told before any work."""
        return True

    def apply(self, ctx: Context[LayerwiseSettings]) -> Outcome:
        """Visit the layers whose weight alone has an integer grid that nobody has frozen."""
        ops = {op.id: op for op in ctx.graph.linear_ops if op.weight is not None}
        free = [
            id for id, op in ops.items()
            if len(ctx.graph.users(op.weight)) == 1 and (e := ctx.encodings.get(op.weight)) and searchable(e)
        ]  # fmt: skip
        walked = walk_of(ctx, self.name)(free, solve, moments_gib=ctx.settings.moments_gib)
        found = {id: result for id, result in walked.items() if not result.left}  # what is left stays as it was
        weights = {ops[id].weight: result for id, result in found.items()}
        gains = [(id, result.figures["before"], result.figures["after"]) for id, result in found.items()]
        return Outcome(
            params={w: result.weight for w, result in weights.items() if w is not None},
            encodings={w: result.encoding for w, result in weights.items() if w is not None},
            report=Report(f"{len(found)} layers rounded", {}, ("layer", "before", "after"), tuple(gains)),
        )


def solve(layer: Layer) -> LayerResult:
    """A layer's codes; a function of a module, so that workers can call it.

    The error is tr(Ŵ qq Ŵᵀ) − 2 tr(Ŵ xqᵀ Wᵀ) + …: moving a column by d changes it by 2 d g + d² qq_kk, where
    g = (Ŵ qq − W xq)_k.
    """
    op, moments, encoding = layer.op, layer.moments, layer.encoding
    scale, zero = (np.broadcast_to(v, layer.weight.shape) for v in encoding.spread(layer.weight.shape))
    nearest = encoding.quantize(layer.weight)
    weight, steps, zeros, codes = (
        to_matrix(op, np.asarray(v, np.float64)).copy() for v in (layer.weight, scale, zero, nearest)
    )
    rounded = (codes - zeros) * steps
    gradient = rounded @ moments.qq - weight @ moments.xq
    before = _error(rounded, weight, layer)
    for k in range(codes.shape[2]):
        curvature = moments.qq[:, k, k, None]  # (groups, 1): a row for each output of a group
        best = np.rint(-gradient[..., k] / np.where(curvature > 0, curvature * steps[..., k], np.inf))
        moved = np.clip(codes[..., k] + best, encoding.grid.qmin, encoding.grid.qmax) - codes[..., k]
        codes[..., k] += moved
        change = moved * steps[..., k]
        rounded[..., k] += change
        gradient += change[..., None] * moments.qq[:, k, None, :]
    chosen = from_matrix(op, codes, layer.weight.shape).astype(np.int64)
    figures = {"before": before, "after": _error(rounded, weight, layer)}
    return LayerResult(encoding.dequantize(chosen), encoding.with_(frozen=True, source=OneSweep.name), figures=figures)


def _error(rounded: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], layer: Layer) -> float:
    """Relative mean squared error of the output, without the bias."""
    m = layer.moments
    power = np.einsum("gok,gkl,gol->", weight, m.xx, weight)
    lost = np.einsum("gok,gkl,gol->", rounded, m.qq, rounded) - 2 * np.einsum("gok,gkl,gol->", weight, m.xq, rounded)
    return float((power + lost) / power) if power > 0 else 0.0
