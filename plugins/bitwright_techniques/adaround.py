"""AdaRound: choose each weight's rounding by the layer's output error, layer after layer.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", solved on the second moments of
each layer's input (see `reconstruction`): calibration data are seen once per layer, whatever the iterations.
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
from bitwright_techniques.joint_search import Choices, Effort, LayerSearch
from bitwright_techniques.layerwise_outcome import outcome_of, rounding_report, select_layers, walk_of
from bitwright_techniques.reconstruction import Reconstruction, corrected_bias, reconstruction
from bitwright_techniques.rounding_relaxation import Relaxation, RelaxedRounding, relax
from bitwright_techniques.scale_search import full_range, search_scales
from bitwright_techniques.weight_grid import Matrix, WeightGrid


class AdaRoundSettings(BaseSettings):
    """Settings of `AdaRound`.

    Attributes:
        solver: "coordinate_descent" searches the roundings directly; "gradient" relaxes them as the paper does.
        inputs: "quantized": each layer makes up for the error of those before it (asymmetric reconstruction);
            "float": layers are independent.
        quantized_activations: activations are quantized too in the network that gives the quantized inputs.
        residuals: a layer whose output is added to a skip connection also makes up for that connection's error.
        scales: "search" chooses the weight scales by the same error; "keep" leaves the encodings' ranges. Frozen
            encodings are kept in any case.
        choices: "neighbours": each weight goes to the grid point just below or above it (AdaRound); "any": to any.
        bias_correction: set the bias that keeps the mean output (closed form).
        damping: share of the mean input power that is added to the input moments' diagonal, against overfitting. On
            EfficientNet-Lite0 with 128 and 250 samples 0.05 kept the logits nearer to float than 0.01.
        include, exclude: names or glob patterns of layers; nothing included means all.
        candidates: scales tried for each channel: fractions i/N of its full range.
        max_sweeps, kicks: coordinate descent: sweeps at most, random restarts from its end. Ten restarts lower the
            layers' error by 2 % in twice the time; EfficientNet-Lite0 was no more accurate for it.
        iterations, learning_rate, regularization, beta, warm_start: gradient (see `Relaxation`).
    """

    solver: Literal["coordinate_descent", "gradient"] = "coordinate_descent"
    inputs: Literal["quantized", "float"] = "quantized"
    quantized_activations: bool = True
    residuals: bool = True
    scales: Literal["search", "keep"] = "search"
    choices: Choices = "neighbours"
    bias_correction: bool = True
    damping: float = Field(0.05, ge=0, le=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    candidates: int = Field(20, ge=1)
    max_sweeps: int = Field(20, ge=1)
    kicks: int = Field(0, ge=0)
    iterations: int = Field(1500, ge=1)
    learning_rate: float = Field(0.03, gt=0)
    regularization: float = Field(1.0, ge=0)
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = Field(0.2, ge=0, lt=1)


_REFINEMENTS = 4
"""Finer scale candidates on each side of the best of the coarse ones."""


class AdaRound:
    """Adaptive rounding of convolutions, transposed convolutions and linear layers."""

    name: ClassVar[str] = "adaround"
    Settings: ClassVar[type[BaseSettings]] = AdaRoundSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: AdaRoundSettings) -> tuple[Request, ...]:
        """None: the walk collects each layer's moments when its turn comes."""
        return ()

    def apply(self, ctx: Context) -> Outcome:
        """Round every selected layer.

        Returns:
            Weights on their grid, frozen encodings, edits that set biases.

        Raises:
            InputError: no calibration data, or a pattern that matches no layer.
        """
        s: AdaRoundSettings = ctx.settings
        walk = walk_of(ctx, self.name)
        ops, skipped = select_layers(ctx, s.include, s.exclude)
        results = walk(
            ops,
            lambda layer: round_layer(layer, s, ctx.rng(layer.op.id)),
            quantized_inputs=s.inputs == "quantized",
            quantized_activations=s.quantized_activations,
            residuals=s.residuals,
        )
        return outcome_of(ctx, results, rounding_report(results, skipped, extra=("settled",)), weights=True)


def round_layer(layer: Layer, settings: AdaRoundSettings, rng: np.random.Generator) -> LayerResult:
    """Solve one layer.

    Args:
        layer: weight, moments and encoding.
        settings: see `AdaRoundSettings`.
        rng: for the random restarts.

    Returns:
        Weight on its grid, frozen encoding, bias, and figures: `before` (relative output error at the encoding that
        came in), `nearest` (nearest rounding at the scales chosen), `after`, `settled` (share of roundings that the
        solver had decided), `seconds`.
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
    if settings.solver == "gradient":
        codes, settled = _relaxed(problem, grid, settings)
    else:
        solver = LayerSearch(problem, settings.choices, Effort(settings.max_sweeps, settings.kicks))
        settled = 1.0
        if search:
            grid, codes = solver.roundings_and_scales(grid, rng)
        else:
            codes = solver.roundings(grid, rng)
    weight = grid.weight(codes)
    energy = max(float(problem.energy.sum()), float(np.finfo(np.float64).tiny))

    def relative(values: Matrix) -> float:
        return float(problem.loss(values).sum()) / energy

    figures = {
        "before": relative(given.values(given.nearest(problem.weight))),
        "nearest": relative(grid.values(grid.nearest(problem.weight))),
        "after": relative(grid.values(codes)),
        "settled": settled,
    }
    bias = None
    if settings.bias_correction:
        bias = corrected_bias(layer.op, layer.weight, weight, layer.bias, layer.moments)
    figures["seconds"] = time.perf_counter() - began
    return LayerResult(weight, grid.frozen("adaround"), bias, figures)


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
