"""Bias correction: undo the shift of output means that quantization causes (Nagel et al. 2019, §4.2).

A layer's mean output changes from W E[x] + b to Ŵ E[x̂] + b, so the bias takes the difference

    Δb = W E[x] − Ŵ E[x̂].

Empirical: both means are measured, layer after layer, each in the network with the biases before it corrected.
Nothing but the inputs' means is needed, no output has to be observed. Analytic: E[x̂] = E[x] follows from the folded
batch norm before the layer (see `expected_inputs`); the model's inputs are taken as standardized (E[x] = 0).

It compares with the float weights that the model has. After a technique that replaces them, such as AdaRound (which
corrects biases itself), only the shift from quantized activations is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Capability
from bitwright.errors import InputError
from bitwright.graph import Graph, Op, OpId, ParamRole, to_matrix
from bitwright.placement import Plan
from bitwright.statistics import Request
from bitwright.technique import Context, Layer, LayerResult, Outcome, Report, walk_of
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.bias_edits import bias_changes
from bitwright_techniques.expected_inputs import ExpectedInputs
from bitwright_techniques.reconstruction import corrected_bias
from bitwright_techniques.token_norms import normalizes_tokens

Biases = dict[OpId, NDArray[np.float32]]


class BiasCorrectionSettings(BaseSettings):
    """How the means are found.

    Attributes:
        mode: "empirical" (needs calibration data), "analytic" (needs folded batch norms), or "auto": empirical where
            there are data, analytic otherwise.
        quantized_activations: measure with activations quantized too (empirical only). "auto": unless the network
            normalizes tokens (see `token_norms`).
    """

    mode: Literal["auto", "empirical", "analytic"] = "auto"
    quantized_activations: bool | Literal["auto"] = "auto"


class BiasCorrection:
    """Corrects the biases of all linear ops whose weights are quantized."""

    name: ClassVar[str] = "bias_correction"
    Settings: ClassVar[type[BaseSettings]] = BiasCorrectionSettings
    requires: ClassVar[frozenset[Capability]] = frozenset()

    def statistics(self, graph: Graph, plan: Plan, settings: Any) -> Iterable[Request]:
        """Means are collected layer by layer."""
        return ()

    def needs_data(self, settings: Any) -> bool:
        """For measured means."""
        return bool(settings.mode == "empirical")

    def apply(self, ctx: Context[BiasCorrectionSettings]) -> Outcome:
        """Correct.

        Raises:
            InputError: empirical mode without calibration data; analytic mode, and no batch norm has been folded.
        """
        ops = [op for op in ctx.graph.linear_ops if op.weight in ctx.encodings]
        mode = ctx.settings.mode
        if mode == "auto":
            mode = "empirical" if ctx.walk is not None else "analytic"
        found = _empirical(ctx, ops) if mode == "empirical" else _analytic(ctx, ops)
        params, edits = bias_changes(ctx.graph, found)
        shifts = {id: float(np.sqrt(np.mean(np.square(new - _bias(ctx, id, new))))) for id, new in found.items()}
        rows = tuple((op.id, mode if op.id in found else "left", shifts.get(op.id, 0.0)) for op in ops)
        figures = {
            "corrected": float(len(found)),
            "left": float(len(ops) - len(found)),
            "largest_shift": max(shifts.values(), default=0.0),
        }
        summary = f"corrected {len(found)} of {len(ops)} biases ({mode})" if ops else "no quantized linear op"
        return Outcome(params, {}, edits, report=Report(summary, figures, ("op", "mode", "rms shift"), rows))


def _bias(ctx: Context[BiasCorrectionSettings], id: OpId, like: NDArray[np.float32]) -> NDArray[np.float32]:
    bias = ctx.graph.op(id).params.get(ParamRole.BIAS)
    return np.zeros_like(like) if bias is None else ctx.params[bias]


def _empirical(ctx: Context[BiasCorrectionSettings], ops: list[Op]) -> Biases:
    def solve(layer: Layer) -> LayerResult:
        quantized = layer.encoding.fake_quantize(layer.weight)
        bias = corrected_bias(layer.op, layer.weight, quantized, layer.bias, layer.moments)
        return LayerResult(layer.weight, layer.encoding, bias)

    walk = walk_of(ctx, BiasCorrection.name)
    active = ctx.settings.quantized_activations
    if active == "auto":
        active = not normalizes_tokens(ctx.graph)
    results = walk([op.id for op in ops], solve, quantized_activations=active, products=False)
    return {id: r.bias for id, r in results.items() if r.bias is not None}


def _analytic(ctx: Context[BiasCorrectionSettings], ops: list[Op]) -> Biases:
    if not ctx.folded:
        raise InputError(
            "analytic bias correction needs the batch norms that fold_batch_norm has folded, and there are none; "
            "put fold_batch_norm before it, or give calibration data for mode='empirical'"
        )
    expected = ExpectedInputs(ctx.graph, ctx.folded)
    found: Biases = {}
    ctx.progress.start("Correcting biases", len(ops))
    for op in ops:
        mean = expected.columns(op)
        ctx.progress.advance(1, op.id)
        if mean is None or op.weight is None:
            continue
        weight = ctx.params[op.weight]
        error = ctx.encodings[op.weight].fake_quantize(weight).astype(np.float64) - weight
        shift = -np.einsum("grk,gk->gr", to_matrix(op, error), mean).reshape(-1).astype(np.float32)
        found[op.id] = _bias(ctx, op.id, shift) + shift
    ctx.progress.finish()
    return found
