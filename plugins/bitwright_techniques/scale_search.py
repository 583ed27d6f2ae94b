"""Weight scales by the layer's output error, exactly, on second moments (SeqMSE)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.grids import Blockwise, QuantSpec, encoding_of_weights
from bitwright_techniques.reconstruction import Reconstruction
from bitwright_techniques.weight_grid import Matrix, WeightGrid

Fractions = NDArray[np.float64]

_SWEEPS = 2
"""Passes over the blocks of a blockwise weight; the second changes little, a third nothing that matters."""


def full_range(grid: WeightGrid, weight: NDArray[np.floating]) -> WeightGrid:
    """The grid at its largest candidate: scales and zero points that cover the whole range of `weight`."""
    e = grid.encoding
    spec = QuantSpec(
        e.bits, e.signed, e.symmetric, e.strict, granularity=e.granularity, pair_limit=e.pair_limit,
        scale_type=e.scale_type,
    )  # fmt: skip
    return WeightGrid.of(grid.op, grid.shape, encoding_of_weights(weight, spec), grid.blocks)


def search_scales(
    problem: Reconstruction, grid: WeightGrid, *, candidates: int = 20, refinements: int = 0
) -> WeightGrid:
    """Scale each channel, tensor or block so that nearest rounding of W gives the least output error.

    Candidates are the fractions i/N of the scales of `grid` (AIMET's SeqMSE), then `refinements` more on either
    side of the best. Rows with one scale are searched exactly. Blocks of a row interact: each is searched with the
    others held, starting from the largest candidate, so the total never rises. LPBQ searches the channel's float
    scale, then every block's integer multiple.

    Args:
        problem: the layer.
        grid: its grid at the largest candidate (`full_range`).
        candidates: N.
        refinements: finer fractions on each side of the best one, up to its neighbours.

    Returns:
        The grid with the best scales; ties go to the larger scale.

    Raises:
        EncodingError: blocks straddle the groups of a grouped op.
    """
    coarse = np.arange(candidates, 0, -1) / candidates
    offsets = _offsets(refinements) / candidates
    if grid.whole_rows or grid.multiples is not None:
        grid = _search_ties(problem, grid, coarse, offsets)
    if not grid.whole_rows:
        grid = _search_blocks(problem, grid, coarse, offsets)
    return grid


def search_channel_scales(problem: Reconstruction, grid: WeightGrid, *, candidates: int = 20) -> WeightGrid:
    """Scale each channel or tensor so, the multiples of LPBQ's blocks held."""
    return _search_ties(problem, grid, np.arange(candidates, 0, -1) / candidates, _offsets(0))


def _offsets(refinements: int) -> Fractions:
    inside = np.arange(refinements, 0, -1) / (refinements + 1)
    return np.concatenate([inside, -inside[::-1]])


def _search_ties(problem: Reconstruction, grid: WeightGrid, coarse: Fractions, offsets: Fractions) -> WeightGrid:
    def cost(factors: Fractions) -> Fractions:
        trial = grid.scaled(factors)
        return trial.per_tie(problem.quick_objective(trial.values(trial.nearest(problem.weight))))

    ties = int(grid.ties.max()) + 1
    best = _Best(cost, np.ones(ties))
    best.try_all(np.full(ties, f) for f in coarse[1:])
    around = best.chosen
    best.try_all(np.clip(around + o, coarse[-1] / 2, 1.0) for o in offsets)
    return grid.scaled(best.chosen)


class _Best:
    """Keeps, entry by entry, the candidate of least cost; the earlier one on ties."""

    def __init__(self, cost: Callable[[Fractions], Fractions], start: Fractions) -> None:
        self.cost, self.chosen, self.least = cost, start, cost(start)

    def try_all(self, candidates: Iterable[Fractions]) -> None:
        for candidate in candidates:
            cost = self.cost(candidate)
            better = cost < self.least
            self.chosen = np.where(better, candidate, self.chosen)
            self.least = np.where(better, cost, self.least)


class _Block:
    """One block of features in all rows: the part of the error that its scales decide, the others' errors given.

    With e the errors ŵ − T of a row, ``e Ĥ eᵀ = e_b Ĥ_bb e_bᵀ + 2 e_b (Ĥ e_rest)_b + rest``.
    """

    def __init__(self, problem: Reconstruction, grid: WeightGrid, features: NDArray[np.intp]) -> None:
        self.features = features
        self.cells = grid.cells[..., features[0]]
        self.unit = problem.unit[:, None]
        self.gram = problem.unit_gram[:, features[:, None], features]
        self.weight = problem.weight[..., features].astype(np.float32)
        self.target = problem.goal[..., features]
        self.low, self.high = (b[..., features] if b.shape[2] > 1 else b for b in (grid.low, grid.high))

    def error(self, scale: NDArray[np.floating]) -> Matrix:
        """ŵ − T of the block under these scales (of the whole weight), (groups, rows, features)."""
        step = scale.astype(np.float32)[self.cells][..., None]
        return np.asarray(np.clip(np.rint(self.weight / step), self.low, self.high) * step - self.target)

    def cost(self, outer: Matrix, scale: Fractions) -> Fractions:
        """Cost of each scale, (scales,); zero for those outside the block."""
        error = self.error(scale)
        rows = np.einsum("grk,grk->gr", error @ self.gram + 2 * outer, error) * self.unit
        sums = np.bincount(self.cells.reshape(-1), rows.reshape(-1), minlength=len(scale))
        return sums.astype(np.float64)


def _search_blocks(problem: Reconstruction, grid: WeightGrid, coarse: Fractions, offsets: Fractions) -> WeightGrid:
    blocks = [_Block(problem, grid, features) for features in segments(grid)]
    error = grid.values(grid.nearest(problem.weight)) - problem.goal
    scale = grid.scale.astype(np.float64)
    largest, multiples, ratio = scale.copy(), grid.multiples, largest_multiple(grid)
    unit = scale if multiples is None else scale / multiples
    for _ in range(_SWEEPS):
        slope = error @ problem.unit_gram
        for block in blocks:
            old = error[..., block.features]
            outer = np.asarray(slope[..., block.features] - old @ block.gram, np.float32)
            best = _Best(partial(block.cost, outer), scale)
            if multiples is None:
                best.try_all(largest * f for f in coarse)
                around = best.chosen
                best.try_all(np.clip(around + largest * o, largest * coarse[-1] / 2, largest) for o in offsets)
            else:
                best.try_all(unit * k for k in range(ratio, 0, -1))
            scale = best.chosen
            new = block.error(scale)
            slope += (new - old) @ problem.unit_gram[:, block.features]
            error[..., block.features] = new
    if multiples is None:
        return grid.with_scale(scale)
    return grid.with_scale(scale, np.rint(scale / unit).astype(np.int32))


def largest_multiple(grid: WeightGrid) -> int:
    """Largest integer multiple of LPBQ's channel scale."""
    layout = grid.encoding.granularity
    wide = layout.decompressed_bits if isinstance(layout, Blockwise) else None
    return 1 if wide is None else int(2 ** (wide - grid.encoding.bits))


def segments(grid: WeightGrid) -> list[NDArray[np.intp]]:
    """Sets of features that share a scale in every row."""
    cells = grid.cells[..., grid.starts]
    label = np.unique(cells[0, 0], return_inverse=True)[1]
    for i in range(int(label.max()) + 1):
        own = cells[..., label == i]
        if (own != own[..., :1]).any():
            raise EncodingError(
                f"{grid.op.id!r}: {grid.encoding.granularity} straddles the groups of the op; "
                "choose a block size that divides the channels of a group"
            )
    label = np.repeat(label, np.diff(np.r_[grid.starts, grid.cells.shape[2]]))
    return [np.flatnonzero(label == i) for i in range(int(label.max()) + 1)]
