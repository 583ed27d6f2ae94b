"""Successive rounding of blockwise weights, each block's scale chosen when its turn comes (GPTQ's grouping).

Frantar et al. 2023, §4: "always using the most current updated weights". With the features before a block settled and
those behind it free, the error that the block's codes cause is ``‖(v − ŵ) U_bb⁻¹‖²`` of its present values v, U being
the factor of `rounding_descent.factor`: the sum of the squared errors that successive rounding spreads. Every candidate
scale is rounded so, and the least sum wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright_techniques.reconstruction import Reconstruction
from bitwright_techniques.rounding_descent import Array, act_order, factor, turn
from bitwright_techniques.scale_search import largest_multiple, segments
from bitwright_techniques.weight_grid import Matrix, WeightGrid

_AT_ONCE = 2**24
"""Values of candidates that are held at a time."""


@dataclass(frozen=True, eq=False)
class _Block:
    """One block in the order of rounding.

    Attributes:
        upper: U_bb, (groups, n, n).
        low, high: bounds of the codes, (groups, rows).
    """

    upper: Array
    low: Array
    high: Array

    def rounded(self, values: Array, scale: Array) -> tuple[Array, Array]:
        """Codes and spread errors of the block's present values, all (groups, n, rows, candidates).

        Args:
            values: (groups, n, rows, 1 or candidates).
            scale: (groups, rows, candidates).
        """
        free = np.repeat(values, scale.shape[2] // values.shape[3], axis=3)
        codes, spread = np.empty_like(free), np.empty_like(free)
        low, high = self.low[..., None], self.high[..., None]
        for k in range(free.shape[1]):
            codes[:, k] = np.clip(np.rint(free[:, k] / scale), low, high)
            spread[:, k] = (free[:, k] - codes[:, k] * scale) / self.upper[:, k, k, None, None]
            free[:, k + 1 :] -= self.upper[:, k, k + 1 :, None, None] * spread[:, None, k]
        return codes, spread


def block_rounding(
    problem: Reconstruction, grid: WeightGrid, *, in_act_order: bool = True, candidates: int = 20
) -> tuple[WeightGrid, Matrix]:
    """Round block after block with scales chosen on the way.

    Args:
        problem: the layer.
        grid: of a blockwise weight; gives zero points, bounds, and LPBQ's channel scales.
        in_act_order: blocks of large mean second moment first, and within each its large features.
        candidates: N scales a block: fractions i/N of the one that covers its present values; LPBQ's integer
            multiples in their place.

    Returns:
        The grid with the scales chosen, and codes (groups, rows, K).

    Raises:
        EncodingError: blocks straddle the groups of a grouped op.
    """
    features = problem.gram.shape[1]
    parts = [np.arange(features)] if grid.whole_rows else segments(grid)
    order = _order(problem.gram, parts, in_act_order)
    _, upper = factor(problem.unit_gram, order)
    lead = np.arange(len(order))[:, None]
    free = turn(problem.goal)[lead, order]
    codes = np.empty_like(free)
    scale = grid.scale.astype(np.float32).copy()
    multiples = None if grid.multiples is None else grid.multiples.copy()
    unit = None if multiples is None else grid.scale / multiples
    first = order[0]
    begin = 0
    while begin < free.shape[1]:
        members = next(p for p in parts if first[begin] in p)
        end = begin + len(members)
        at = 0 if grid.whole_rows else members[0]
        cells = grid.cells[..., at]
        block = _Block(upper[:, begin:end, begin:end], grid.low[..., at], grid.high[..., at])
        values = free[:, begin:end]
        if unit is None:
            tried = _covering(values, block)[..., None] * (np.arange(candidates, 0, -1) / candidates)
        else:
            tried = unit[cells][..., None] * np.arange(largest_multiple(grid), 0, -1)
        choice = _choose(block, values, tried.astype(np.float32), cells, scale.size)
        taken = np.take_along_axis(tried, choice[cells][..., None], axis=2)[..., 0]
        scale[cells] = taken.astype(np.float32)
        if multiples is not None:
            multiples[cells] = largest_multiple(grid) - choice[cells]
        step = scale[cells]
        settled, spread = block.rounded(values[..., None], step[..., None])
        codes[:, begin:end] = settled[..., 0]
        free[:, end:] -= np.swapaxes(upper[:, begin:end, end:], 1, 2) @ spread[..., 0]
        begin = end
    result = np.empty_like(codes)
    result[lead, order] = codes
    return grid.with_scale(scale, multiples), turn(result)


def _order(gram: NDArray[np.float64], parts: list[NDArray[np.intp]], in_act_order: bool) -> NDArray[np.intp]:
    if not in_act_order:
        return np.tile(np.concatenate(parts), (len(gram), 1))
    power = np.einsum("gkk->gk", gram)
    parts = sorted(parts, key=lambda p: -float(power[:, p].mean()))
    return np.concatenate([p[act_order(gram[:, p[:, None], p])] for p in parts], axis=1)


def _covering(values: Array, block: _Block) -> NDArray[np.float64]:
    """The smallest scale at which no value of the block is clipped, zero points held, (groups, rows)."""
    top, bottom = values.max(axis=1), values.min(axis=1)
    above = np.where(block.high > 0, top / np.maximum(block.high, 1), 0.0)
    below = np.where(block.low < 0, bottom / np.minimum(block.low, -1), 0.0)
    return np.maximum(np.maximum(above, below), np.finfo(np.float32).tiny).astype(np.float64)


def _choose(block: _Block, values: Array, tried: Array, cells: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """The best candidate of each scale, (scales,); the first on ties. Cells that aren't the block's have none."""
    width = max(1, _AT_ONCE // max(values.size, 1))
    costs = []
    for start in range(0, tried.shape[2], width):
        spread = block.rounded(values[..., None], tried[..., start : start + width])[1]
        rows = np.square(spread).sum(axis=1, dtype=np.float64)
        costs += [np.bincount(cells.reshape(-1), rows[..., c].reshape(-1), count) for c in range(rows.shape[2])]
    return np.asarray(np.argmin(np.stack(costs), axis=0))
