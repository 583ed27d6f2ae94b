"""GPTQ: round weights feature after feature, and let those still free make up for each error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", on the second
moments of each layer's input. Here the target is W C (Ĥ + λI)⁻¹ and not W itself, so that a layer also makes up for
the error of its quantized inputs; convolutions, grouped and transposed ones too, are rounded as matrices. Blocks of
floats (MXFP4, MXFP8, NVFP4, NF4) are rounded to the nearest value of their format at the scales that they have.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
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
    Array,
    RoundingProblem,
    Settled,
    act_order,
    clipped,
    factor,
    least_of,
    successive_rounding,
)
from bitwright_techniques.scale_refit import sweep, sweep_with_scales
from bitwright_techniques.scale_search import search_channel_scales
from bitwright_techniques.weight_grid import Matrix, WeightGrid

Factored = tuple[NDArray[np.intp], Array]
"""Order of rounding and R, of `factor`."""
Option = tuple[WeightGrid, Matrix, NDArray[np.float64]]
"""Codes on a grid, and the output error of each row."""


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
            each scale is fitted to its codes before they are moved. The paper has none.
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
        As `solve_layer`, with the figure `nearest` (nearest rounding, at the scales searched where they are searched
        beforehand).
    """

    def choose(task: RoundingTask) -> Rounded:
        problem, given = task.problem, task.given
        dynamic = task.searched and settings.groups == "dynamic" and not given.whole_rows
        start = task.bounds if dynamic else task.widest if task.searched else given
        options = []
        if np.array_equal(given.encoding.zero_point, start.encoding.zero_point):
            options.append((given, task.given_codes, task.given_loss))
        if not task.searched:
            found = given, rounded(problem, given, settings)
        elif dynamic:
            if not options:
                options.append(_nearest(problem, start))
            if start.multiples is not None:
                start = search_channel_scales(problem, start, candidates=settings.candidates)
            found = block_rounding(problem, start, in_act_order=settings.act_order, candidates=settings.candidates)
        else:
            factored = factor(problem.unit_gram, _order(problem, settings))
            if given.whole_rows:
                grid = search_row_scales(problem, start, factored, candidates=settings.candidates)
            else:
                grid = task.grid
            options.append(_nearest(problem, grid))
            found = grid, rounded(problem, grid, settings, factored)
        return _best(problem, [*options, improved(problem, *found, settings, refit=task.searched)])

    return solve_layer(layer, settings, Gptq.name, choose, floats=True)


def improved(
    problem: Reconstruction, grid: WeightGrid, found: Settled, settings: GptqSettings, *, refit: bool
) -> Option:
    """Codes after `sweeps` of coordinate descent; with `refit` scales are fitted to them on the way."""
    for _ in range(settings.sweeps):
        if refit:
            grid, found = sweep_with_scales(problem, grid, found)
        else:
            found = sweep(problem, grid, found)
    loss = problem.loss(grid.values(found.codes)) if found.loss is None else found.loss
    return grid, found.codes, loss


def rounded(
    problem: Reconstruction, grid: WeightGrid, settings: GptqSettings, factored: Factored | None = None
) -> Settled:
    """Codes by successive rounding at fixed scales."""
    posed = RoundingProblem.of(problem.unit_gram, problem.goal, grid.step, grid.low, grid.high, grid.snap)
    order, upper = factor(problem.unit_gram, _order(problem, settings)) if factored is None else factored
    return Settled(successive_rounding(posed, order, upper, block=settings.block_size))


def _order(problem: Reconstruction, settings: GptqSettings) -> NDArray[np.intp]:
    groups, _, features = problem.weight.shape
    return act_order(problem.diagonal) if settings.act_order else np.tile(np.arange(features), (groups, 1))


def search_row_scales(problem: Reconstruction, grid: WeightGrid, factored: Factored, *, candidates: int) -> WeightGrid:
    """Scale each channel or tensor so that successive rounding is to leave the least error.

    With R the factor of Ĥ, feature k leaves R_kk² times the square of its own rounding error. That of its value in T
    stands for it, which other features' errors will have moved.
    """
    order, upper = factored
    pivot = np.empty(order.shape, np.float32)
    np.put_along_axis(pivot, order, np.einsum("gkk->gk", upper), 1)
    fractions = np.arange(candidates, 0, -1) / candidates

    def cost(at: NDArray[np.intp], wanted: NDArray[np.bool_]) -> NDArray[np.float64]:
        rows = np.flatnonzero(wanted[grid.ties].any(axis=0))
        values = problem.goal[:, rows] if len(rows) < grid.ties.shape[1] else problem.goal
        step = grid.scaled(fractions[at]).step[:, rows]
        error = values / step
        clipped(np.rint(error, out=error), grid.low[:, rows], grid.high[:, rows])
        error *= step
        error -= values
        error *= pivot[:, None]
        power = np.einsum("grk,grk->gr", error, error)
        sums = np.bincount(grid.ties[:, rows].reshape(-1), power.reshape(-1), len(at))
        return sums.astype(np.float64)

    return grid.scaled(fractions[least_of(candidates, int(grid.ties.max()) + 1, cost)])


def _nearest(problem: Reconstruction, grid: WeightGrid) -> Option:
    codes = grid.nearest(problem.single)
    return grid, codes, problem.loss(grid.values(codes))


def _best(problem: Reconstruction, options: list[Option]) -> Rounded:
    """For each set of rows that share scales, the option of least output error; later ones win ties.

    The first are nearest rounding at the encoding that came in, and at other scales; the last is another rounding.
    """
    grid, codes, least = options[0]
    for other, theirs, loss in options[1:]:
        take = grid.per_tie(loss) <= grid.per_tie(least)
        rows = take[grid.ties]
        codes, least = np.where(rows[..., None], theirs, codes), np.where(rows, loss, least)
        grid = grid.chosen(take, other)
    return Rounded(grid, codes, {"nearest": problem.relative(options[-2][2])}, least)
