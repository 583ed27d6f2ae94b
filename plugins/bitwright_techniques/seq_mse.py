"""SeqMSE: choose each weight's scale by the layer's output error, layer after layer.

The sequential MSE search of AIMET, evaluated exactly on the second moments of each layer's input: the error of a
candidate costs one small matrix product, whatever the number of samples.
"""

from __future__ import annotations

import time
from functools import partial
from typing import ClassVar

from pydantic import Field

from bitwright.backend import Capability
from bitwright.graph import Graph
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Layer, LayerResult, LayerwiseSettings, Outcome, frozen_note, walk_of
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.layerwise_outcome import outcome_of, search_report, select_layers
from bitwright_techniques.reconstruction import Inputs, corrected_bias, reconstruction
from bitwright_techniques.scale_search import full_range, search_scales
from bitwright_techniques.weight_grid import WeightGrid


class SeqMseSettings(LayerwiseSettings):
    """Settings of `SeqMse`, beside those of `LayerwiseSettings`.

    Attributes:
        candidates: scales tried for each channel or block: fractions i/N of its full range.
        refinements: finer candidates on each side of the best of those.
        inputs: "quantized": weight and candidate both see the quantized network's input (AIMET's "symqt");
            "float": both see the float network's ("symfp"); "asymmetric": the candidate sees the quantized one and is
            compared with the float output ("asym").
        quantized_activations: activations are quantized too in the network that gives the quantized inputs.
        bias_correction: also set the bias that keeps the mean output, and count only what it leaves.
        include, exclude: names or glob patterns of layers; nothing included means all.
    """

    candidates: int = Field(20, ge=1)
    refinements: int = Field(0, ge=0)
    inputs: Inputs = "quantized"
    quantized_activations: bool = False
    bias_correction: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


class SeqMse:
    """Scale search for the weights of convolutions, transposed convolutions and linear layers."""

    name: ClassVar[str] = "seq_mse"
    Settings: ClassVar[type[BaseSettings]] = SeqMseSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: SeqMseSettings) -> tuple[Request, ...]:
        """None: the walk collects each layer's moments when its turn comes."""
        return ()

    def needs_data(self, settings: SeqMseSettings) -> bool:
        """The moments of layers are of data."""
        return True

    def apply(self, ctx: Context[SeqMseSettings]) -> Outcome:
        """Search the scales of every selected layer; weights stay, frozen encodings are left alone.

        Raises:
            InputError: no calibration data, or a pattern that matches no layer.
        """
        s = ctx.settings
        walk = walk_of(ctx, self.name)
        ops, skipped = select_layers(ctx, s.include, s.exclude, skip_frozen=True)
        results = walk(
            ops,
            partial(scale_layer, settings=s),
            quantized_inputs=s.inputs != "float",
            quantized_activations=s.quantized_activations,
            moments_gib=s.moments_gib,
            thin=s.thin,
            column_blocks=True,
        )
        report = search_report(results, skipped, "weight scale", note=frozen_note(ctx))
        return outcome_of(ctx, results, report, weights=False)


def scale_layer(layer: Layer, settings: SeqMseSettings) -> LayerResult:
    """Search one layer's scales.

    Returns:
        The weight rounded to its new grid (for the layers that follow), the frozen encoding, the bias if it is
        corrected, and figures: `before` and `after` (relative output error), `seconds`.
    """
    began = time.perf_counter()
    problem = reconstruction(
        layer.op, layer.weight, layer.moments, free_bias=settings.bias_correction, damping=0.0, inputs=settings.inputs
    )
    given = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding, layer.moments.blocks)
    grid = search_scales(
        problem,
        full_range(given, layer.weight),
        candidates=settings.candidates,
        refinements=settings.refinements,
    )
    weight = grid.weight(grid.nearest(problem.weight))
    figures = {
        name: problem.relative_loss(g.values(g.nearest(problem.weight)))
        for name, g in (("before", given), ("after", grid))
    }
    bias = None
    if settings.bias_correction:
        bias = corrected_bias(layer.op, layer.weight, weight, layer.bias, layer.moments)
    figures["seconds"] = time.perf_counter() - began
    return LayerResult(weight, grid.frozen("seq_mse"), bias, figures)
