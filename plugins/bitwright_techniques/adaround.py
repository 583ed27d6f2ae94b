"""AdaRound: choose each weight's rounding by the layer's output error, layer after layer.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", solved on the second moments of
each layer's input (see `reconstruction`): calibration data are seen once per layer, whatever the iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from bitwright.backend import Capability
from bitwright.graph import Graph, OpId
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Layer, LayerResult, Outcome, Settings, seeded
from bitwright_techniques.joint_search import Choices, Effort, LayerSearch
from bitwright_techniques.layer_rounding import Rounded, RoundingSettings, RoundingTask, round_layers, solve_layer
from bitwright_techniques.reconstruction import Reconstruction
from bitwright_techniques.rounding_relaxation import Relaxation, RelaxedRounding, relax
from bitwright_techniques.weight_grid import Matrix, WeightGrid


class AdaRoundSettings(RoundingSettings):
    """Settings of `AdaRound`, beside those of `RoundingSettings`.

    Attributes:
        damping: the search follows the calibration samples more closely than successive rounding does, and needs more
            of it: on EfficientNet-Lite0 at W4A8 0.5 kept the logits 0.6 dB nearer to float than 0.05, with 64 and 128
            samples; 1 was as good, 0.2 0.2 dB less.
        solver: "coordinate_descent" searches the roundings directly; "gradient" relaxes them as the paper does.
        choices: "neighbours": each weight goes to the grid point just below or above it (AdaRound); "any": to any.
        max_sweeps, kicks: coordinate descent: sweeps at most, random restarts from its end. Ten restarts lower the
            layers' error by 2 % in twice the time; EfficientNet-Lite0 was no more accurate for it.
        iterations, learning_rate, regularization, beta, warm_start: gradient (see `Relaxation`).
    """

    damping: float = Field(0.5, ge=0, le=1)
    solver: Literal["coordinate_descent", "gradient"] = "coordinate_descent"
    choices: Choices = "neighbours"
    max_sweeps: int = Field(20, ge=1)
    kicks: int = Field(0, ge=0)
    iterations: int = Field(1500, ge=1)
    learning_rate: float = Field(0.03, gt=0)
    regularization: float = Field(1.0, ge=0)
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = Field(0.2, ge=0, lt=1)


class AdaRound:
    """Adaptive rounding of convolutions, transposed convolutions and linear layers."""

    name: ClassVar[str] = "adaround"
    Settings: ClassVar[type[Settings]] = AdaRoundSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: AdaRoundSettings) -> tuple[Request, ...]:
        """None: the walk collects each layer's moments when its turn comes."""
        return ()

    def needs_data(self, settings: AdaRoundSettings) -> bool:
        """The moments of layers are of data."""
        return True

    def apply(self, ctx: Context[AdaRoundSettings]) -> Outcome:
        """Round every selected layer.

        Returns:
            Weights on their grid, frozen encodings, edits that set biases.

        Raises:
            InputError: no calibration data, or a pattern that matches no layer.
        """
        places = {op.id: i for i, op in enumerate(ctx.graph.linear_ops)}
        return round_layers(ctx, self.name, _Rule(ctx.seed, places), extra=("settled",))


@dataclass(frozen=True)
class _Rule:
    """`round_layer` with the random numbers of the layer's place; its name differs between frameworks."""

    seed: int
    places: Mapping[OpId, int]

    def __call__(self, layer: Layer, settings: AdaRoundSettings) -> LayerResult:
        return round_layer(layer, settings, seeded(self.seed, f"layer {self.places[layer.op.id]}"))


def round_layer(layer: Layer, settings: AdaRoundSettings, rng: np.random.Generator) -> LayerResult:
    """Solve one layer.

    Args:
        layer: weight, moments and encoding.
        settings: see `AdaRoundSettings`.
        rng: for the random restarts.

    Returns:
        As `solve_layer`, with the figures `nearest` (nearest rounding at the scales chosen) and `settled` (share of
        roundings that the solver had decided).
    """

    def choose(task: RoundingTask) -> Rounded:
        problem, grid = task.problem, task.grid
        settled = 1.0
        if settings.solver == "gradient":
            codes, settled = _relaxed(problem, grid, settings)
        else:
            solver = LayerSearch(problem, settings.choices, Effort(settings.max_sweeps, settings.kicks))
            if task.searched:
                grid, codes = solver.roundings_and_scales(grid, rng)
            else:
                codes = solver.roundings(grid, rng)
        nearest = problem.relative_loss(grid.values(grid.nearest(problem.weight)))
        return Rounded(grid, codes, {"nearest": nearest, "settled": settled})

    return solve_layer(layer, settings, AdaRound.name, choose)


def _relaxed(problem: Reconstruction, grid: WeightGrid, s: AdaRoundSettings) -> tuple[Matrix, float]:
    weight = problem.weight.astype(np.float32)
    low, high = grid.neighbours(weight)
    schedule = Relaxation(s.iterations, s.learning_rate, s.beta, s.warm_start)
    relaxed = RelaxedRounding(problem.unit_gram, problem.goal, grid.step, low, high, s.regularization)
    codes, settled = relax(relaxed, weight, schedule)
    # A row that the relaxation left worse than nearest rounding (possible with few iterations) keeps the latter.
    near = grid.nearest(weight)
    worse = problem.objective(grid.values(codes)) > problem.objective(grid.values(near))
    return np.where(worse[..., None], near, codes), settled
