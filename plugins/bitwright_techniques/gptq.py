"""GPTQ: round weights feature after feature, and let those still free make up for each error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", on the second
moments of each layer's input. Here the target is W C (Ĥ + λI)⁻¹ and not W itself, so that a layer also makes up for
the error of its quantized inputs; convolutions, grouped and transposed ones too, are rounded as matrices. Blocks of
floats (MXFP4, MXFP8, NVFP4, NF4) are rounded to the nearest value of their format at the scales that they have.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from bitwright.backend import Capability
from bitwright.graph import Graph
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Layer, LayerResult, Outcome, Settings
from bitwright_techniques.block_rounding import block_rounding
from bitwright_techniques.layer_rounding import Rounded, RoundingSettings, RoundingTask, round_layers, solve_layer
from bitwright_techniques.reconstruction import Reconstruction
from bitwright_techniques.rounding_descent import (
    RoundingProblem,
    act_order,
    coordinate_descent,
    factor,
    successive_rounding,
    turn,
)
from bitwright_techniques.scale_refit import refit_scales
from bitwright_techniques.scale_search import search_channel_scales
from bitwright_techniques.weight_grid import Matrix, WeightGrid


class GptqSettings(RoundingSettings):
    """Settings of `Gptq`, beside those of `RoundingSettings`.

    Attributes:
        scales: the paper keeps them.
        groups: scales of blockwise weights (with `scales: search`). "dynamic": each block's is chosen when its turn
            comes, on its weights as the errors of the blocks before have changed them; "static": all beforehand.
        act_order: features of large second moment first. Blockwise weights with dynamic scales: blocks by their mean
            moment, then the features within each, so that every block stays one run of channels.
        damping: the paper has 0.01; on EfficientNet-Lite0 with 64 samples 0.05 was the more accurate. Without any, Ĥ
            may have no Cholesky factor.
        block_size: features between two updates of all that follow; it changes the time, not the result.
        sweeps: after it, passes over all codes, each moved to its optimum with the others held; with `scales: search`
            the scales are fitted to the codes before each. The paper has none.
    """

    groups: Literal["dynamic", "static"] = "dynamic"
    act_order: bool = True
    damping: float = Field(0.05, gt=0, le=1)
    block_size: int = Field(32, ge=1)
    sweeps: int = Field(1, ge=0)


class Gptq:
    """Successive rounding with error feedback for convolutions, transposed convolutions and linear layers."""

    name: ClassVar[str] = "gptq"
    Settings: ClassVar[type[Settings]] = GptqSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: GptqSettings) -> tuple[Request, ...]:
        """None: the walk collects each layer's moments when its turn comes."""
        return ()

    def needs_data(self, settings: GptqSettings) -> bool:
        """The moments of layers are of data."""
        return True

    def apply(self, ctx: Context[GptqSettings]) -> Outcome:
        """Round every selected layer.

        Returns:
            Weights on their grid, frozen encodings, edits that set biases.

        Raises:
            InputError: no calibration data, or a pattern that matches no layer.
        """
        return round_layers(ctx, self.name, round_layer, floats=True)


def round_layer(layer: Layer, settings: GptqSettings) -> LayerResult:
    """Solve one layer.

    Rows (or channels that share a scale) for which nearest rounding is better on the moments keep it, so that no
    layer is worse than it was.

    Returns:
        As `solve_layer`, with the figure `nearest` (nearest rounding at the scales searched).
    """

    def choose(task: RoundingTask) -> Rounded:
        problem, given = task.problem, task.given
        on_the_way = task.searched and settings.groups == "dynamic" and not given.whole_rows
        grid = task.widest if on_the_way else task.grid
        options = [(grid, grid.nearest(problem.weight))]
        if task.searched and np.array_equal(given.encoding.zero_point, grid.encoding.zero_point):
            options = [(given, given.nearest(problem.weight)), *([] if on_the_way else options)]
        if on_the_way:
            if grid.multiples is not None:
                grid = search_channel_scales(problem, grid, candidates=settings.candidates)
            found = block_rounding(problem, grid, in_act_order=settings.act_order, candidates=settings.candidates)
        else:
            found = grid, rounded(problem, grid, settings)
        options.append(improved(problem, *found, settings, refit=task.searched))
        return _best(problem, options)

    return solve_layer(layer, settings, Gptq.name, choose, floats=True)


def improved(
    problem: Reconstruction, grid: WeightGrid, codes: Matrix, settings: GptqSettings, *, refit: bool
) -> tuple[WeightGrid, Matrix]:
    """Codes after `sweeps` of coordinate descent, before each of which, with `refit`, scales are fitted to them."""
    for _ in range(settings.sweeps):
        if refit:
            grid = refit_scales(problem, grid, codes)
        posed = RoundingProblem.of(problem.unit_gram, problem.goal, grid.step, grid.low, grid.high, grid.snap)
        codes = turn(coordinate_descent(posed, turn(codes), max_sweeps=1))
    return grid, codes


def rounded(problem: Reconstruction, grid: WeightGrid, settings: GptqSettings) -> Matrix:
    """Codes by successive rounding at fixed scales, (groups, rows, K)."""
    groups, _, features = problem.weight.shape
    order = act_order(problem.diagonal) if settings.act_order else np.tile(np.arange(features), (groups, 1))
    posed = RoundingProblem.of(problem.unit_gram, problem.goal, grid.step, grid.low, grid.high, grid.snap)
    codes = successive_rounding(posed, *factor(problem.unit_gram, order), block=settings.block_size)
    return turn(codes)


def _best(problem: Reconstruction, options: list[tuple[WeightGrid, Matrix]]) -> Rounded:
    """For each set of rows that share scales, the option of least output error; later ones win ties.

    The first are nearest rounding at the encoding that came in, and at other scales; the last is another rounding.
    """
    losses = [problem.loss(grid.values(codes)) for grid, codes in options]
    grid, codes = options[0]
    least = grid.per_tie(losses[0])
    for (other, theirs), rows in zip(options[1:], losses[1:], strict=True):
        loss = grid.per_tie(rows)
        take = loss <= least
        codes = np.where(take[grid.ties][..., None], theirs, codes)
        grid, least = grid.chosen(take, other), np.where(take, loss, least)
    return Rounded(grid, codes, {"nearest": problem.relative(losses[-2])})
