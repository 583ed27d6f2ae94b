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
from bitwright_techniques.rounding_descent import Array, RoundingProblem, Settled, coordinate_descent, descend, turn
from bitwright_techniques.scale_search import segments
from bitwright_techniques.weight_grid import Matrix, WeightGrid


def sweep_with_scales(problem: Reconstruction, grid: WeightGrid, found: Settled) -> tuple[WeightGrid, Settled]:
    """Scales and codes after one pass over all: each scale is fitted to the codes that it has, then those are moved.

    A scale stays where the best isn't positive or, once it is of the type that scales are stored in, no better. LPBQ's
    all stay, which are integer multiples, and those of blocks that several rows share.

    Args:
        problem: the layer.
        grid: that of the codes.
        found: the codes.
    """
    if grid.whole_rows:
        grid = _refit_rows(problem, grid, found.codes)
    elif grid.multiples is None and grid.alone:
        return _sweep_blocks(problem, grid, found)
    return grid, sweep(problem, grid, found)


def sweep(problem: Reconstruction, grid: WeightGrid, found: Settled) -> Settled:
    """Codes after one pass over all, at these scales."""
    posed = RoundingProblem.of(problem.unit_gram, problem.goal, grid.step, grid.low, grid.high, grid.snap)
    return Settled(coordinate_descent(posed, found.turned, max_sweeps=1))


def _sweep_blocks(problem: Reconstruction, grid: WeightGrid, found: Settled) -> tuple[WeightGrid, Settled]:
    """Block after block, features in the order of blocks: those of one needn't lie together."""
    parts = segments(grid)
    order = np.concatenate(parts)
    gram, target, turned, error = problem.unit_gram, turn(problem.goal), found.turned, found.error
    low, high = turn(grid.low), turn(grid.high)
    ordered = bool(np.all(np.diff(order) == 1))
    if error is None:
        error = turned * turn(grid.step) - target
    if ordered:
        turned, error = turned.copy(), error.copy()
    else:
        gram = gram[:, order[:, None], order]
        target, turned, error = (a[:, order] for a in (target, turned, error))
        low, high = (b if b.shape[1] == 1 else b[:, order] for b in (low, high))
    scale = grid.scale.astype(np.float32)
    posed = RoundingProblem(gram, target, np.empty((len(gram), 1, 0), np.float32), low, high, grid.snap)
    power, squares = np.zeros((2, len(gram), target.shape[2]))
    begin = 0
    for members in parts:
        run = slice(begin, begin + len(members))
        own, mine, at = posed.run(run), turned[:, run], grid.cells[..., members[0]]
        # Of the slope Ĥ e what the features before make, as they are now: twice that is their part of the error.
        settled = gram[:, run, :begin] @ error[:, :begin]
        slope = gram[:, run, begin:] @ error[:, begin:]
        slope += settled
        reach = own.gram @ mine
        slope += reach * _fit(grid, scale, at, mine, reach, slope)[:, None]
        step = scale[at][:, None]
        descend(replace(own, step=step), mine, slope)
        left = error[:, run]
        np.multiply(mine, step, out=left)
        left -= own.target
        settled *= 2
        settled += own.gram @ left
        power += np.einsum("gkr,gkr->gr", settled, left)
        squares += np.einsum("gkr,gkr->gr", left, left)
        begin = run.stop
    if not ordered:
        turned, error = (_placed(a, order) for a in (turned, error))
    # With other inputs than the float network's, T isn't W, and little is left of the difference to its error.
    loss = problem.undamp(power, squares) if problem.cross is None else None
    return grid.with_scale(scale), Settled(turned, error, loss)


def _placed(array: Array, order: NDArray[np.intp]) -> Array:
    """Features, in some order, where they belong."""
    placed = np.empty_like(array)
    placed[:, order] = array
    return placed


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
