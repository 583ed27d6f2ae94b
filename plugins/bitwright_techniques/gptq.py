"""GPTQ: round weights feature after feature, and let those still free make up for each error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", on the second
moments of each layer's input. Here the target is W C (Ĥ + λI)⁻¹ and not W itself, so that a layer also makes up for
the error of its quantized inputs; convolutions, grouped and transposed ones too, are rounded as matrices.
"""

from __future__ import annotations

import time
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from bitwright.backend import Capability
from bitwright.graph import Graph
from bitwright.plan import Plan
from bitwright.statistics.base import Request
from bitwright.technique import Context, Layer, LayerResult, Outcome
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.block_rounding import block_rounding
from bitwright_techniques.layerwise_outcome import outcome_of, rounding_report, select_layers, walk_of
from bitwright_techniques.reconstruction import Reconstruction, corrected_bias, reconstruction
from bitwright_techniques.rounding_descent import RoundingProblem, act_order, factor, successive_rounding, turn
from bitwright_techniques.scale_search import full_range, search_scales
from bitwright_techniques.weight_grid import Matrix, WeightGrid

_REFINEMENTS = 4
"""Finer scale candidates on each side of the best of the coarse ones."""


class GptqSettings(BaseSettings):
    """Settings of `Gptq`.

    Attributes:
        inputs: "quantized": each layer makes up for the error of those before it; "float": layers are independent.
        quantized_activations: activations are quantized too in the network that gives the quantized inputs.
        residuals: a layer whose output is added to a skip connection also makes up for that connection's error.
        scales: "search" chooses weight scales by the layer's output error; "keep" leaves the encodings' ranges, as
            the paper does. Frozen encodings are kept in any case.
        groups: scales of blockwise weights (with `scales: search`). "dynamic": each block's is chosen when its turn
            comes, on its weights as the errors of the blocks before have changed them; "static": all beforehand.
        act_order: features of large second moment first. Blockwise weights with dynamic scales: blocks by their mean
            moment, then the features within each, so that every block stays one run of channels.
        damping: share of the mean input power that is added to the moments' diagonal, against overfitting. The paper
            has 0.01; on EfficientNet-Lite0 with 64 samples 0.05 was the more accurate.
        block_size: features between two updates of all that follow; it changes the time, not the result.
        bias_correction: set the bias that keeps the mean output (closed form).
        candidates: scales tried for each channel or block: fractions i/N of its full range.
        include, exclude: names or glob patterns of layers; nothing included means all.
    """

    inputs: Literal["quantized", "float"] = "quantized"
    quantized_activations: bool = True
    residuals: bool = True
    scales: Literal["search", "keep"] = "search"
    groups: Literal["dynamic", "static"] = "dynamic"
    act_order: bool = True
    damping: float = Field(0.05, gt=0, le=1)
    block_size: int = Field(32, ge=1)
    bias_correction: bool = True
    candidates: int = Field(20, ge=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class Gptq:
    """Successive rounding with error feedback for convolutions, transposed convolutions and linear layers."""

    name: ClassVar[str] = "gptq"
    Settings: ClassVar[type[BaseSettings]] = GptqSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: GptqSettings) -> tuple[Request, ...]:
        """None: the walk collects each layer's moments when its turn comes."""
        return ()

    def apply(self, ctx: Context) -> Outcome:
        """Round every selected layer.

        Returns:
            Weights on their grid, frozen encodings, edits that set biases.

        Raises:
            InputError: no calibration data, or a pattern that matches no layer.
        """
        s: GptqSettings = ctx.settings
        walk = walk_of(ctx, self.name)
        ops, skipped = select_layers(ctx, s.include, s.exclude)
        results = walk(
            ops,
            lambda layer: round_layer(layer, s),
            quantized_inputs=s.inputs == "quantized",
            quantized_activations=s.quantized_activations,
            residuals=s.residuals,
        )
        return outcome_of(ctx, results, rounding_report(results, skipped), weights=True)


def round_layer(layer: Layer, settings: GptqSettings) -> LayerResult:
    """Solve one layer.

    Rows (or channels that share a scale) for which nearest rounding is better on the moments keep it, so that no
    layer is worse than it was.

    Returns:
        Weight on its grid, frozen encoding, bias, and figures: `before` (relative output error at the encoding that
        came in), `nearest` (nearest rounding at the scales chosen), `after`, `seconds`.
    """
    began = time.perf_counter()
    problem = reconstruction(
        layer.op,
        layer.weight,
        layer.moments,
        free_bias=settings.bias_correction,
        damping=settings.damping,
        inputs="asymmetric" if settings.inputs == "quantized" else "float",
    )
    given = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding)
    search = settings.scales == "search" and not layer.encoding.frozen
    grid = given
    if search:
        grid = search_scales(
            problem, full_range(given, layer.weight), candidates=settings.candidates, refinements=_REFINEMENTS
        )
    options = [(grid, grid.nearest(problem.weight))]
    if search and np.array_equal(given.encoding.zero_point, grid.encoding.zero_point):
        options.append((given, given.nearest(problem.weight)))
    if search and settings.groups == "dynamic" and not grid.whole_rows:
        options.append(block_rounding(problem, grid, in_act_order=settings.act_order, candidates=settings.candidates))
    options.append((grid, rounded(problem, grid, settings)))
    energy = max(float(problem.energy.sum()), float(np.finfo(np.float64).tiny))
    nearest = float(problem.loss(grid.values(options[0][1])).sum()) / energy
    before = float(problem.loss(given.values(given.nearest(problem.weight))).sum()) / energy
    grid, codes = _best(problem, options)
    weight = grid.weight(codes)
    figures = {
        "before": before,
        "nearest": nearest,
        "after": float(problem.loss(grid.values(codes)).sum()) / energy,
    }
    bias = None
    if settings.bias_correction:
        bias = corrected_bias(layer.op, layer.weight, weight, layer.bias, layer.moments)
    figures["seconds"] = time.perf_counter() - began
    return LayerResult(weight, grid.frozen("gptq"), bias, figures)


def rounded(problem: Reconstruction, grid: WeightGrid, settings: GptqSettings) -> Matrix:
    """Codes by successive rounding at fixed scales, (groups, rows, K)."""
    groups, _, features = problem.weight.shape
    order = act_order(problem.gram) if settings.act_order else np.tile(np.arange(features), (groups, 1))
    posed = RoundingProblem.of(problem.unit_gram, problem.goal, grid.step, grid.low, grid.high)
    codes = successive_rounding(posed, *factor(problem.unit_gram, order), block=settings.block_size)
    return turn(codes)


def _best(problem: Reconstruction, options: list[tuple[WeightGrid, Matrix]]) -> tuple[WeightGrid, Matrix]:
    """For each set of rows that share scales, the option of least output error; later ones win ties."""
    grid, codes = options[0]
    least = grid.per_tie(problem.loss(grid.values(codes)))
    for other, theirs in options[1:]:
        loss = grid.per_tie(problem.loss(other.values(theirs)))
        take = loss <= least
        codes = np.where(take[grid.ties][..., None], theirs, codes)
        grid, least = grid.chosen(take, other), np.where(take, loss, least)
    return grid, codes
