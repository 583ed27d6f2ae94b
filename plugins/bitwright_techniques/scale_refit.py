"""Scales that fit the codes of a weight: least squares, solved exactly.

With codes c held, ŵ is linear in its scales, so that the damped error of what they scale is ``sᵀ A s − 2 bᵀ s`` and a
constant: of a row with one scale for each of its blocks, ``A_ij = c_i Ĥ_ij c_jᵀ`` and ``b_i = c_i (Ĥ Tᵀ)_i``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright_techniques.reconstruction import Array, Reconstruction
from bitwright_techniques.scale_search import segments
from bitwright_techniques.weight_grid import Matrix, WeightGrid

_AT_ONCE = 2**24
"""Numbers of A that are held at a time."""
_RIDGE = 1e-6
"""Part of A's diagonal that is added to it: the inputs may not tell two blocks apart."""


def refit_scales(problem: Reconstruction, grid: WeightGrid, codes: Matrix) -> WeightGrid:
    """The grid with the scales at which these codes have the least damped error.

    A scale stays where the best isn't positive or, once it is of the type that scales are stored in, no better. LPBQ's
    all stay, which are integer multiples, and those of blocks that several rows share.

    Args:
        problem: the layer.
        grid: that of the codes.
        codes: (groups, rows, K).
    """
    if grid.whole_rows:
        return _refit_rows(problem, grid, codes)
    parts = segments(grid)
    cells = np.stack([grid.cells[..., p[0]] for p in parts], axis=-1)
    if grid.multiples is not None or len(np.unique(cells)) < cells.size:
        return grid
    order = np.concatenate(parts)
    scale = grid.scale.astype(np.float64)
    width = max(1, _AT_ONCE // len(parts) ** 2)
    for group in range(len(codes)):
        gram = problem.unit_gram[group][order[:, None], order]
        goal = np.ascontiguousarray(problem.goal[group][:, order].T)
        turned, pull = np.ascontiguousarray(codes[group][:, order].T), gram @ goal
        for start in range(0, codes.shape[1], width):
            rows = slice(start, start + width)
            a, b = _normal_equations(gram, turned[:, rows], pull[:, rows], len(parts))
            own = cells[group, rows]
            found, trial = np.linalg.solve(a, b[..., None])[..., 0], scale.copy()
            trial[own] = np.where(found > 0, found, scale[own])
            stored, old = grid.with_scale(trial).scale.astype(np.float64)[own], scale[own]
            better = _form(a, b, stored) < _form(a, b, old)
            scale[own] = np.where(better[:, None], stored, old)
    return grid.with_scale(scale)


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


def _normal_equations(
    gram: NDArray[np.float32], codes: NDArray[np.float32], pull: NDArray[np.float32], blocks: int
) -> tuple[Array, Array]:
    """A (rows, blocks, blocks) and b (rows, blocks) of codes and Ĥ Tᵀ, both (K, rows), in equal runs of features."""
    own = codes.reshape(blocks, -1, codes.shape[1])
    size = own.shape[1]
    products = np.empty((blocks, blocks, codes.shape[1]), np.float32)
    for j in range(blocks):
        product = gram[:, j * size : (j + 1) * size] @ own[j]
        products[j] = np.einsum("ikr,ikr->ir", own, product.reshape(own.shape))
    b = np.einsum("ikr,ikr->ri", own, pull.reshape(own.shape)).astype(np.float64)
    a = np.moveaxis(products, 2, 0).astype(np.float64)
    diagonal = np.einsum("rii->ri", a)
    # A block of zeros has no say: its scale is left by the equation s = 0, which isn't positive.
    diagonal += np.where(diagonal > 0, _RIDGE * diagonal, 1.0)
    return a, b


def _form(a: Array, b: Array, scale: Array) -> Array:
    """``sᵀ A s − 2 bᵀ s`` of rows."""
    return np.asarray(np.einsum("ri,rij,rj->r", scale, a, scale, optimize=True) - 2 * (b * scale).sum(axis=1))
