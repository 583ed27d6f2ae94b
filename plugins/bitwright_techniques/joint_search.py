"""Roundings and scales of one layer together: the discrete solver behind `adaround`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitwright_techniques.reconstruction import Reconstruction
from bitwright_techniques.rounding_descent import (
    Array,
    RoundingProblem,
    coordinate_descent,
    factor,
    kick,
    successive_rounding,
    turn,
)
from bitwright_techniques.weight_grid import WeightGrid

Choices = Literal["neighbours", "any"]


@dataclass(frozen=True)
class Effort:
    """How hard the discrete solver tries.

    Attributes:
        max_sweeps: of one coordinate descent.
        kicks: random restarts of the final descent.
        factors: multiples of the searched scales that are tried with optimized roundings.
        refits: rounds of refitting the scales to the codes and descending again.
    """

    max_sweeps: int = 20
    kicks: int = 0
    factors: tuple[float, ...] = (1.0, 0.85, 0.9, 0.95, 1.05, 1.1)
    refits: int = 2


class LayerSearch:
    """The searches of one layer; all share the factor of its Ĥ.

    Args:
        problem: the layer.
        choices: "neighbours": each weight takes the code below or above it (AdaRound); "any": any code of the grid.
        effort: how hard to try.
    """

    def __init__(self, problem: Reconstruction, choices: Choices, effort: Effort) -> None:
        self.problem, self.choices, self.effort = problem, choices, effort
        self.weight = problem.weight.astype(np.float32)
        self.factor = factor(problem.unit_gram)

    def posed(self, grid: WeightGrid) -> RoundingProblem:
        """The rounding problem on a grid."""
        low, high = grid.neighbours(self.weight) if self.choices == "neighbours" else (grid.low, grid.high)
        return RoundingProblem.of(self.problem.unit_gram, self.problem.goal, grid.step, low, high)

    def start(self, posed: RoundingProblem, grid: WeightGrid, max_sweeps: int) -> Array:
        """Descend from the better of successive and nearest rounding, row by row."""
        near, spread = turn(grid.nearest(self.weight)), successive_rounding(posed, *self.factor)
        better = np.where((posed.loss(spread) < posed.loss(near))[:, None], spread, near)
        return coordinate_descent(posed, better, max_sweeps=max_sweeps)

    def roundings(self, grid: WeightGrid, rng: np.random.Generator) -> NDArray[np.float32]:
        """Codes at fixed scales, (groups, rows, K)."""
        posed = self.posed(grid)
        return self._finish(posed, self.start(posed, grid, self.effort.max_sweeps), rng)

    def roundings_and_scales(
        self, grid: WeightGrid, rng: np.random.Generator
    ) -> tuple[WeightGrid, NDArray[np.float32]]:
        """Codes and scales, alternating: scales near those of `grid`, then least-squares scales for the codes."""
        best: WeightGrid | None = None
        for f in self.effort.factors:
            trial = grid.scaled(np.full(int(grid.ties.max()) + 1, f))
            codes = self.start(self.posed(trial), trial, max_sweeps=4)
            if best is None:
                best, chosen, loss = trial, codes, self._loss(trial, codes)
            else:
                best, chosen, loss = self._better(best, chosen, loss, trial, codes)
        assert best is not None
        for _ in range(self.effort.refits):
            trial = best.scaled(self._fit(best, chosen))
            posed = self.posed(trial)
            codes = coordinate_descent(posed, np.clip(chosen, posed.low, posed.high), max_sweeps=self.effort.max_sweeps)
            best, chosen, loss = self._better(best, chosen, loss, trial, codes)
        return best, self._finish(self.posed(best), chosen, rng)

    def _finish(self, posed: RoundingProblem, codes: Array, rng: np.random.Generator) -> NDArray[np.float32]:
        codes = coordinate_descent(posed, codes, max_sweeps=self.effort.max_sweeps)
        return turn(kick(posed, codes, rng, kicks=self.effort.kicks))

    def _loss(self, grid: WeightGrid, codes: Array) -> NDArray[np.float64]:
        return grid.per_tie(self.problem.quick_objective(grid.values(turn(codes))))

    def _better(
        self, grid: WeightGrid, codes: Array, loss: NDArray[np.float64], other: WeightGrid, theirs: Array
    ) -> tuple[WeightGrid, Array, NDArray[np.float64]]:
        their_loss = self._loss(other, theirs)
        take = their_loss < loss
        codes = np.where(take[grid.ties][:, None], theirs, codes)
        return grid.chosen(take, other), codes, np.where(take, their_loss, loss)

    def _fit(self, grid: WeightGrid, codes: Array) -> NDArray[np.float64]:
        """Factor α of each tie that minimises the error of α·ŵ: Σ (ŵ Ĥ)·T / Σ (ŵ Ĥ)·ŵ, where it is positive."""
        values = grid.values(turn(codes))
        product = values @ self.problem.unit_gram
        unit = self.problem.unit[:, None]
        along = grid.per_tie(np.einsum("grk,grk->gr", product, self.problem.goal) * unit)
        power = grid.per_tie(np.einsum("grk,grk->gr", product, values) * unit)
        fits = (along > 0) & (power > 0)
        return np.where(fits, along / np.where(fits, power, 1.0), 1.0)
