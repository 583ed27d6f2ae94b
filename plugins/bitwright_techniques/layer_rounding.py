"""What techniques that choose the codes of one layer's weight after another share: settings, walk, and figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitwright.graph import Graph
from bitwright.technique import Context, Layer, LayerResult, LayerwiseSettings, Outcome, walk_of
from bitwright_techniques.layerwise_outcome import outcome_of, rounding_report, select_layers
from bitwright_techniques.reconstruction import Reconstruction, corrected_bias, reconstruction
from bitwright_techniques.scale_search import full_range, search_scales
from bitwright_techniques.token_norms import normalizes_tokens
from bitwright_techniques.weight_grid import Matrix, WeightGrid

_REFINEMENTS = 4
"""Finer scale candidates on each side of the best of the coarse ones."""


class RoundingSettings(LayerwiseSettings):
    """Settings that all of them have, beside those of `LayerwiseSettings`.

    Attributes:
        inputs: "quantized": each layer makes up for the error of those before it (asymmetric reconstruction);
            "float": layers are independent. "auto": quantized, but float in networks that normalize tokens (see
            `token_norms`).
        quantized_activations: activations are quantized too in the network that gives the quantized inputs.
        residuals: a layer whose output is added to a skip connection also makes up for that connection's error.
        scales: "search" chooses the weight scales by the layer's output error; "keep" leaves the encodings' ranges.
            Frozen encodings are kept in any case.
        candidates: scales tried for each channel or block: fractions i/N of its full range.
        bias_correction: set the bias that keeps the mean output (closed form). "auto": of layers that have one, unless
            it would take back the error of quantized inputs in a network that normalizes tokens; `true` gives one to
            layers without, which formats of checkpoints have no place for.
        damping: share of the mean input power that is added to the input moments' diagonal, against overfitting.
        include, exclude: names or glob patterns of layers; nothing included means all.
    """

    inputs: Literal["quantized", "float", "auto"] = "auto"
    quantized_activations: bool = True
    residuals: bool = True
    scales: Literal["search", "keep"] = "search"
    candidates: int = Field(20, ge=1)
    bias_correction: bool | Literal["auto"] = "auto"
    damping: float = Field(0.05, ge=0, le=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


AnySettings = TypeVar("AnySettings", bound=RoundingSettings)
Settings_contra = TypeVar("Settings_contra", bound=RoundingSettings, contravariant=True)


class Rule(Protocol[Settings_contra]):
    """Solves a layer."""

    def __call__(self, layer: Layer, settings: Settings_contra) -> LayerResult:
        """The layer's new numbers."""


@dataclass(frozen=True, eq=False)
class RoundingTask:
    """One layer to round.

    Attributes:
        weight: float, canonical layout.
        problem: its output error as a function of its weight.
        given: the grid of the encoding that came in.
        searched: whether scales may be chosen.
        candidates: scales that are tried then.
    """

    weight: NDArray[np.float32]
    problem: Reconstruction
    given: WeightGrid
    searched: bool
    candidates: int

    @cached_property
    def given_codes(self) -> Matrix:
        """Nearest rounding at the encoding that came in."""
        return self.given.nearest(self.problem.single)

    @cached_property
    def given_loss(self) -> NDArray[np.float64]:
        """Output error of each row under it, (groups, rows)."""
        return self.problem.loss(self.given.values(self.given_codes))

    @cached_property
    def widest(self) -> WeightGrid:
        """The grid that covers the weight's whole range."""
        return full_range(self.given, self.weight)

    @cached_property
    def bounds(self) -> WeightGrid:
        """A grid with the codes and zero points of `widest`, for those who choose each scale anew."""
        e = self.given.encoding
        same = e.signed and e.symmetric and e.pair_limit is None and e.block_scale is None
        return self.given if same else self.widest

    @cached_property
    def grid(self) -> WeightGrid:
        """The grid to start from: `given`, or with scales chosen by nearest rounding's output error."""
        if not self.searched:
            return self.given
        return search_scales(self.problem, self.widest, candidates=self.candidates, refinements=_REFINEMENTS)


@dataclass(frozen=True)
class Rounded:
    """Codes (groups, rows, K) on a grid, and what is to be reported: `nearest`, the relative output error of nearest
    rounding, and what else the rule tells.

    Attributes:
        loss: output error of each row, (groups, rows), where the rule knows it.
    """

    grid: WeightGrid
    codes: Matrix
    figures: Mapping[str, float]
    loss: NDArray[np.float64] | None = None


def decided(graph: Graph, settings: AnySettings) -> AnySettings:
    """The settings with what the network decides of "auto"; where biases are corrected, it is left to the layer."""
    normalized = normalizes_tokens(graph)
    inputs, corrects = settings.inputs, settings.bias_correction
    if inputs == "auto":
        inputs = "float" if normalized else "quantized"
    if corrects == "auto" and inputs == "quantized" and normalized:
        corrects = False
    return settings.model_copy(update={"inputs": inputs, "bias_correction": corrects})


def round_layers(
    ctx: Context[AnySettings],
    technique: str,
    solve: Rule[AnySettings],
    extra: Sequence[str] = (),
    *,
    floats: bool = False,
) -> Outcome:
    """Walk over the layers that the context's `RoundingSettings` select.

    Args:
        ctx: the technique's context.
        technique: its name.
        solve: solves a layer with the settings that are `decided`; workers can do so too if it is no
            closure.
        extra: figures that the report has beside `before`, `nearest`, `after` and `seconds`.
        floats: weights in blocks of floats are solved too.

    Returns:
        Weights on their grid, frozen encodings, edits that set biases.

    Raises:
        InputError: no calibration data, or a pattern that matches no layer.
    """
    s: AnySettings = decided(ctx.graph, ctx.settings)
    walk = walk_of(ctx, technique)
    ops, skipped = select_layers(ctx, s.include, s.exclude, floats=floats)
    results = walk(
        ops,
        partial(solve, settings=s),
        quantized_inputs=s.inputs == "quantized",
        quantized_activations=s.quantized_activations,
        residuals=s.residuals,
        moments_gib=s.moments_gib,
        thin=s.thin,
        column_blocks=True,
    )
    return outcome_of(ctx, results, rounding_report(results, skipped, extra=extra), weights=True)


def solve_layer(
    layer: Layer,
    settings: RoundingSettings,
    technique: str,
    choose: Callable[[RoundingTask], Rounded],
    *,
    floats: bool = False,
) -> LayerResult:
    """Round one layer by a rule; with `floats` one in blocks of floats too, whose scales are kept.

    Returns:
        Weight on its grid, frozen encoding, bias, and figures: `before` (relative output error at the encoding that
        came in), `after`, those of the rule, `seconds`.
    """
    began = time.perf_counter()
    corrects = layer.bias is not None if settings.bias_correction == "auto" else settings.bias_correction
    problem = reconstruction(
        layer.op,
        layer.weight,
        layer.moments,
        free_bias=corrects,
        damping=settings.damping,
        inputs="float" if settings.inputs == "float" else "asymmetric",
    )
    given = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding, layer.moments.blocks, floats=floats)
    searched = settings.scales == "search" and not layer.encoding.frozen and layer.encoding.float_format is None
    task = RoundingTask(layer.weight, problem, given, searched, settings.candidates)
    found = choose(task)
    codes = found.grid.allowed(found.codes, problem.weight)
    weight = found.grid.weight(codes)
    known = found.loss if codes is found.codes else None
    figures = {
        "before": problem.relative(task.given_loss),
        "after": problem.relative(problem.loss(found.grid.values(codes)) if known is None else known),
        **found.figures,
    }
    bias = None
    if corrects:
        bias = corrected_bias(layer.op, layer.weight, weight, layer.bias, layer.moments)
    figures["seconds"] = time.perf_counter() - began
    return LayerResult(weight, found.grid.frozen(technique), bias, figures)
