"""Weight clipping: give up the far ends of a weight's range for a finer grid, where that lowers the error.

Each channel or block is searched on its own: the clipping of Banner et al. 2019 ("Post training 4-bit quantization of
convolutional networks for rapid-deployment", §4) by exact search, by the weight's own squared error or, with data, by
the layer's output error δᵀHδ (as the clipping step of AWQ, Lin et al. 2024). Asymmetric grids are clipped at each end.
Layers are independent; `seq_mse` walks layer by layer and sees quantized inputs.
"""

from __future__ import annotations

import time
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitwright.backend import Capability
from bitwright.graph import Graph, Op, to_matrix
from bitwright.grids import Encoding, QuantSpec, encoding_from_range, to_groups
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, LayerResult, LayerwiseSettings, Outcome, frozen_note, walk_of
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.layerwise_outcome import outcome_of, search_report, select_layers
from bitwright_techniques.reconstruction import Reconstruction, UnitGram, reconstruction
from bitwright_techniques.scale_search import full_range, search_scales
from bitwright_techniques.weight_grid import WeightGrid

_REFINEMENTS = 4
"""Finer fractions on each side of the best of the coarse ones."""
_ROUNDS = 2
"""Rounds over the two ends of an asymmetric grid."""


class WeightClippingSettings(LayerwiseSettings):
    """Settings of `WeightClipping`, beside those of `LayerwiseSettings`.

    Attributes:
        metric: "weights": squared error of the weights, without data; "output": squared error of the layer's output,
            on data; "auto": the latter where there are data.
        candidates: fractions i/N of the full range that are tried.
        include, exclude: names or glob patterns of layers; nothing included means all.
    """

    metric: Literal["auto", "weights", "output"] = "auto"
    candidates: int = Field(20, ge=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class WeightClipping:
    """Range search for the weights of convolutions, transposed convolutions and linear layers."""

    name: ClassVar[str] = "weight_clipping"
    Settings: ClassVar[type[BaseSettings]] = WeightClippingSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: WeightClippingSettings) -> tuple[Request, ...]:
        """None: moments come layer by layer."""
        return ()

    def needs_data(self, settings: WeightClippingSettings) -> bool:
        """By the output's error alone."""
        return settings.metric == "output"

    def apply(self, ctx: Context[WeightClippingSettings]) -> Outcome:
        """Search the range of every selected weight; weights stay, frozen encodings are left alone.

        Raises:
            InputError: metric "output" without data, or a pattern that matches no layer.
        """
        s = ctx.settings
        ops, skipped = select_layers(ctx, s.include, s.exclude, skip_frozen=True)
        by_output = s.metric == "output" or (s.metric == "auto" and ctx.walk is not None)
        if by_output:
            results = dict(
                walk_of(ctx, self.name)(
                    ops,
                    lambda layer: clip_layer(
                        layer.op,
                        layer.weight,
                        layer.encoding,
                        reconstruction(
                            layer.op, layer.weight, layer.moments, free_bias=False, damping=0.0, inputs="float"
                        ),
                        s.candidates,
                    ),
                    quantized_inputs=False,
                    quantized_activations=False,
                    moments_gib=s.moments_gib,
                    thin=s.thin,
                )
            )
        else:
            results = {}
            ctx.progress.start("Clipping weights", len(ops))
            for id in ops:
                op = ctx.graph.op(id)
                weight = np.asarray(ctx.params[op.weight or ""], np.float32)
                encoding = ctx.encodings[op.weight or ""]
                results[id] = clip_layer(op, weight, encoding, weight_problem(op, weight), s.candidates)
                ctx.progress.advance(1, id)
            ctx.progress.finish()
        error = "output error" if by_output else "weight error"
        report = search_report(results, skipped, "weight range", error, frozen_note(ctx))
        return outcome_of(ctx, results, report, weights=False)


def weight_problem(op: Op, weight: NDArray[np.floating]) -> Reconstruction:
    """The error of the weights themselves as a problem: Ĥ is the identity."""
    matrix = np.asarray(to_matrix(op, weight), np.float64)
    groups, _, features = matrix.shape
    identity = partial(np.tile, np.eye(features), (groups, 1, 1))
    scaled = UnitGram.of(identity())
    return Reconstruction(matrix, identity, np.zeros(groups), scaled, matrix, matrix, np.square(matrix).sum(axis=2))


def clip_layer(
    op: Op, weight: NDArray[np.float32], encoding: Encoding, problem: Reconstruction, candidates: int
) -> LayerResult:
    """Search one weight's range.

    Returns:
        The rounded weight, its frozen encoding, and figures `before` and `after` (relative error), `seconds`.
    """
    began = time.perf_counter()
    given = WeightGrid.of(op, weight.shape, encoding)
    grid = full_range(given, weight)
    if grid.whole_rows and not encoding.symmetric:
        grid = _search_ends(problem, grid, weight, candidates)
    else:
        grid = search_scales(problem, grid, candidates=candidates, refinements=_REFINEMENTS)
    errors = [problem.relative_loss(g.values(g.nearest(problem.weight))) for g in (given, grid)]
    if errors[1] > errors[0]:  # a range that some finer search has found
        grid, errors[1] = given, errors[0]
    figures = {
        "before": errors[0],
        "after": errors[1],
        "seconds": time.perf_counter() - began,
    }
    weight = grid.weight(grid.nearest(problem.weight))
    return LayerResult(weight, grid.frozen("weight_clipping"), None, figures)


def _search_ends(problem: Reconstruction, grid: WeightGrid, weight: NDArray[np.float32], candidates: int) -> WeightGrid:
    """The best share of the range below zero and of that above it, for each channel or the tensor."""
    e = grid.encoding
    spec = QuantSpec(e.bits, e.signed, False, granularity=e.granularity)
    groups = to_groups(weight, e.granularity)
    low, high = np.minimum(groups.min(axis=-1), 0.0), np.maximum(groups.max(axis=-1), 0.0)

    def at(shares: NDArray[np.float64]) -> WeightGrid:
        below, above = (s[grid.tie_of_cell].reshape(e.scale.shape) for s in shares)
        return WeightGrid.of(grid.op, grid.shape, encoding_from_range(spec, low * below, high * above))

    def cost(trial: WeightGrid) -> NDArray[np.float64]:
        return trial.per_tie(problem.quick_objective(trial.values(trial.nearest(problem.weight))))

    ties = int(grid.ties.max()) + 1
    best = np.ones((2, ties))
    least = cost(at(best))
    fractions = np.arange(candidates, 0, -1) / candidates
    fine = np.concatenate([[o, -o] for o in np.arange(1, _REFINEMENTS + 1) / (_REFINEMENTS + 1) / candidates])

    def attempt(shares: NDArray[np.float64]) -> None:
        nonlocal best, least
        shares = np.clip(shares, 0.5 / candidates, 1.0)
        found = cost(at(shares))
        take = found < least
        best, least = np.where(take, shares, best), np.where(take, found, least)

    for f in fractions[1:]:
        attempt(np.full((2, ties), f))
    for _ in range(_ROUNDS):
        for end in (0, 1):
            for f in fractions:
                trial = best.copy()
                trial[end] = f
                attempt(trial)
            around = best.copy()
            for o in fine:
                trial = best.copy()
                trial[end] = around[end] + o
                attempt(trial)
    return at(best)
