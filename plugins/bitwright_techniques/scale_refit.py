"""Scales that fit the codes of a weight: least squares in each scale, the others held.

With codes c held, ŵ is linear in a scale, so that the damped error is a parabola in it. To move the scale of a block b
of a row by δ adds ``2 δ c_b (Ĥ e)_b + δ² c_b Ĥ_bb c_b``, e = c·s − T being the row's errors. (To solve for all scales
of a row at once takes several times as long, and the error that is left is the same within 0.5 %.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bitwright_techniques.reconstruction import Reconstruction
from bitwright_techniques.rounding_descent import Array, RoundingProblem, coordinate_descent, descend, turn
from bitwright_techniques.scale_search import segments
from bitwright_techniques.weight_grid import Matrix, WeightGrid


def sweep_with_scales(problem: Reconstruction, grid: WeightGrid, codes: Matrix) -> tuple[WeightGrid, Matrix]:
    """Scales and codes after one pass over all: each scale is fitted to the codes that it has, then those are moved.

    A scale stays where the best isn't positive or, once it is of the type that scales are stored in, no better. LPBQ's
    all stay, which are integer multiples, and those of blocks that several rows share.

    Args:
        problem: the layer.
        grid: that of the codes.
        codes: (groups, rows, K).
    """
    if not grid.whole_rows:
        parts = segments(grid)
        cells = np.stack([grid.cells[..., p[0]] for p in parts], axis=-1)
        if grid.multiples is None and grid.alone:
            return _sweep_blocks(problem, grid, codes, parts, cells)
    else:
        grid = _refit_rows(problem, grid, codes)
    return grid, sweep(problem, grid, codes)


def sweep(problem: Reconstruction, grid: WeightGrid, codes: Matrix) -> Matrix:
    """Codes after one pass over all, at these scales."""
    posed = RoundingProblem.of(problem.unit_gram, problem.goal, grid.step, grid.low, grid.high, grid.snap)
    return turn(coordinate_descent(posed, turn(codes), max_sweeps=1))


def _sweep_blocks(
    problem: Reconstruction, grid: WeightGrid, codes: Matrix, parts: list[NDArray[np.intp]], cells: NDArray[np.intp]
) -> tuple[WeightGrid, Matrix]:
    """Block after block; their scales are `cells`, (groups, rows, blocks)."""
    order = np.concatenate(parts)
    gram, goal, step, mine = problem.unit_gram, problem.goal, grid.step, codes
    if np.any(np.diff(order) != 1):
        gram = gram[:, order[:, None], order]
        goal, step, mine = (a[..., order] for a in (goal, step, mine))
    low, high = (b if b.shape[2] == 1 else b[..., order] for b in (grid.low, grid.high))
    posed = RoundingProblem.of(gram, goal, step, low, high, grid.snap)
    turned, scale = turn(mine), grid.scale.astype(np.float32)
    before = turned * posed.step
    moved = before - posed.target
    slope = gram @ moved
    begin = 0
    for block, members in enumerate(parts):
        run = slice(begin, begin + len(members))
        own, mine, at, now = posed.run(run), turned[:, run], cells[..., block], slope[:, run]
        if begin:
            now += gram[:, run, :begin] @ moved[:, :begin]
        reach = own.gram @ mine
        now += reach * _fit(grid, scale, at, mine, reach, now)[:, None]
        step = scale[at][:, None]
        descend(replace(own, step=step), mine, now)
        np.subtract(mine * step, before[:, run], out=moved[:, run])
        begin = run.stop
    result = np.empty_like(codes)
    result[..., order] = turn(turned)
    return grid.with_scale(scale), result


def _fit(grid: WeightGrid, scale: Array, cells: NDArray[np.intp], codes: Array, reach: Array, slope: Array) -> Array:
    """Fit the scales of a block, in place; returns what they moved by, (groups, rows)."""
    along, power = np.einsum("gkr,gkr->gr", codes, slope), np.einsum("gkr,gkr->gr", codes, reach)
    old = scale[cells]
    best = old - along / np.where(power > 0, power, 1)
    found = grid.stored(np.where((power > 0) & (best > 0), best, old), cells)
    better = (2 * along + power * (found - old)) * (found - old) < 0
    scale[cells] = np.where(better, found, old)
    return np.where(better, found - old, np.float32(0))


def _refit_rows(problem: Reconstruction, grid: WeightGrid, codes: Matrix) -> WeightGrid:
    product = codes @ problem.unit_gram
    a, b = (
        np.bincount(
            grid.cells.reshape(-1),
            (np.einsum("grk,grk->gr", product, other) * problem.unit[:, None]).reshape(-1),
            grid.scale.size,
        )
        for other in (codes, problem.goal)
    )
    old = grid.scale.astype(np.float64)
    fits = (a > 0) & (b > 0)
    stored = grid.with_scale(np.where(fits, b / np.where(fits, a, 1.0), old)).scale.astype(np.float64)
    return grid.with_scale(np.where(a * stored**2 - 2 * b * stored < a * old**2 - 2 * b * old, stored, old))
