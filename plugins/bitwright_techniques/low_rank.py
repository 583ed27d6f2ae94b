"""Low-rank correction: a narrow branch beside a rounded layer takes back what it can of the rounding's error.

With E = W − Ŵ what rounding has left of a weight and H = E[x xᵀ] the second moments of the layer's input, the branch
that y = Ŵ x + b + up (down x) leaves the least mean squared output error with has

    up · down = U Uᵀ E,   U: the leading eigenvectors of E H Eᵀ,

since with H = S Sᵀ the best matrix of that rank to E S is U Uᵀ E S (Eckart & Young 1936), and no other branch does
better, however S is chosen. This is the optimum of QERA (Zhang et al. 2024, *QERA: an Analytical Framework for
Quantization Error Reconstruction*), whose form SVD(E H^½) H^−½ needs an H that can be inverted; LQER (Zhang et al.
2024, *LQER: Low-Rank Quantization Error Reconstruction for LLMs*) takes the diagonal of H for H, and LoRC of
ZeroQuant-V2 (Yao et al. 2023) takes none. Being a projection of the error, the branch raises it for no input whatever.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from bitwright.backend import Capability
from bitwright.errors import InputError
from bitwright.graph import AddBranch, Graph, OpId, branch_names, split_columns
from bitwright.grids import FLOAT, cast_float, parse_type
from bitwright.placement import Plan
from bitwright.statistics import LayerMoments, Request
from bitwright.technique import (
    Context,
    Layer,
    LayerResult,
    LayerwiseSettings,
    Outcome,
    Report,
    walk_of,
)
from bitwright.technique import Settings as BaseSettings
from bitwright_techniques.gptq import GptqSettings, round_layer
from bitwright_techniques.layerwise_outcome import outcome_of, select_layers
from bitwright_techniques.reconstruction import corrected_bias

Matrix = NDArray[np.float64]
_HALF = ("float16", "bfloat16")


class LowRankSettings(LayerwiseSettings):
    """Settings of `LowRank`.

    Attributes:
        rank: features of a branch: it adds rank · (inputs + outputs) numbers to a layer; at most the layer's own rank.
        rounding: how the weight is rounded before: "gptq" with its default settings, on the same moments, or "nearest"
            at the encoding in force, which `seq_mse`, `weight_clipping` or `awq` may have chosen. A weight that another
            technique has rounded already is left alone: what it was isn't known any more.
        branch_weights: type of the branch's matrices: "float", "float16", "bfloat16", "int8", … "auto": float16 where
            the layer's input stays in float, int8 elsewhere.
        most_bits: weights of more bits are left alone.
        least_gain: share of the layer's output error, after rounding, that the branch must take back; otherwise the
            layer gets none.
        bias_correction: the bias keeps the mean output (closed form), and the branch is for what varies. "auto": of
            layers that have one.
        include, exclude: names or glob patterns of layers; nothing included means all.
    """

    rank: int = Field(16, ge=1)
    rounding: Literal["gptq", "nearest"] = "gptq"
    branch_weights: str = "auto"
    most_bits: int = Field(4, ge=1)
    least_gain: float = Field(0.05, ge=0, lt=1)
    bias_correction: bool | Literal["auto"] = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @field_validator("branch_weights")
    @classmethod
    def _is_type(cls, text: str) -> str:
        if text not in ("auto", FLOAT):
            try:
                parse_type(text)
            except InputError as error:
                raise ValueError(str(error)) from None
        return text


class LowRank:
    """Rounds linear layers and puts a branch of low rank beside each."""

    name: ClassVar[str] = "low_rank"
    Settings: ClassVar[type[BaseSettings]] = LowRankSettings
    requires: ClassVar[frozenset[Capability]] = frozenset({Capability.BRANCHING})

    def statistics(self, graph: Graph, plan: Plan, settings: LowRankSettings) -> Iterable[Request]:
        """None: the walk collects each layer's moments when its turn comes."""
        return ()

    def needs_data(self, settings: LowRankSettings) -> bool:
        """The moments of layers are of data."""
        return True

    def apply(self, ctx: Context[LowRankSettings]) -> Outcome:
        """Round and correct every selected layer, each on the float network's input.

        Raises:
            InputError: no calibration data, or a pattern that matches no layer.
        """
        s = ctx.settings
        walk = walk_of(ctx, self.name)
        chosen, skipped = select_layers(ctx, s.include, s.exclude, skip_frozen=True, floats=True)
        for id in list(chosen):
            bits = ctx.encodings[ctx.graph.op(id).weight or ""].bits
            reason = ctx.branch_obstacle(id) or (f"weight has {bits} bits" if bits > s.most_bits else "")
            if reason:
                chosen.remove(id)
                skipped[id] = reason
        types = {id: _type_of(ctx, id) for id in chosen}
        results = walk(
            chosen,
            partial(correct_layer, settings=s, types=types),
            quantized_inputs=False,
            moments_gib=s.moments_gib,
            thin=s.thin,
            column_blocks=True,
        )
        branches = [AddBranch(id, r.extra["down"], r.extra["up"]) for id, r in results.items() if "down" in r.extra]
        # Without a branch a layer that would be rounded to nearest anyway keeps its float weight for other techniques.
        changed = {id: r for id, r in results.items() if "down" in r.extra or s.rounding != "nearest"}
        outcome = outcome_of(ctx, changed, _report(results, skipped, types, s), weights=True)
        overrides = {
            op: {"weights": types[b.op]} for b in branches for op in (branch_names(b.op).down, branch_names(b.op).up)
        }
        return replace(outcome, edits=[*outcome.edits, *branches], overrides=overrides)


def _type_of(ctx: Context[LowRankSettings], id: OpId) -> str:
    """The type of a layer's branch."""
    if ctx.settings.branch_weights != "auto":
        return ctx.settings.branch_weights
    source = ctx.graph.op(id).data_inputs[0]
    return "float16" if ctx.plan.spec(ctx.plan.root(source)) is None else "int8"


def correct_layer(layer: Layer, settings: LowRankSettings, types: Mapping[OpId, str]) -> LayerResult:
    """Round one layer and find its branch.

    Args:
        layer: a matrix product.
        settings: of the technique.
        types: of the matrices of each layer's branch.

    Returns:
        Weight on its grid, frozen encoding, bias, the matrices `down` and `up` in `extra` unless the branch brings too
        little, and figures: `before` and `after`, the relative output error without and with the branch, `parameters`
        that it adds, `seconds`.

    Raises:
        FloatingPointError: the moments aren't finite.
    """
    began = time.perf_counter()
    corrects = layer.bias is not None if settings.bias_correction == "auto" else settings.bias_correction
    weight, encoding, bias = _rounded(layer, settings, corrects)
    error, moments = layer.weight.astype(np.float64) - weight, layer.moments
    power = output_power(layer.weight, moments, centred=corrects)
    rank = min(settings.rank, *error.shape)
    down, up = branch_of(error, moments, rank, centred=corrects)
    if types[layer.op.id] in _HALF:
        down, up = (_in_half(m, types[layer.op.id]) for m in (down, up))
    left = error - up.astype(np.float64) @ down
    before, after = (output_power(m, moments, centred=corrects) for m in (error, left))
    found: dict[str, NDArray[np.float32]] = {}
    if after < before and after <= (1 - settings.least_gain) * before:
        found = {"down": down, "up": up}
        if corrects:
            whole = np.asarray(weight + up @ down, np.float32)
            bias = corrected_bias(layer.op, layer.weight, whole, layer.bias, moments)
    else:
        after = before
    least = float(np.finfo(np.float64).tiny)
    figures = {
        "before": before / max(power, least),
        "after": after / max(power, least),
        "parameters": float(sum(m.size for m in found.values())),
        "seconds": time.perf_counter() - began,
    }
    return LayerResult(weight, encoding.with_(frozen=True, source=LowRank.name), bias, figures, extra=found)


def _rounded(layer: Layer, settings: LowRankSettings, corrects: bool) -> tuple[NDArray[np.float32], Any, Any]:
    """The weight on its grid, the encoding, and a new bias or None."""
    if settings.rounding == "gptq":
        found = round_layer(layer, GptqSettings(inputs="float", bias_correction=corrects))
        return found.weight, found.encoding, found.bias
    return layer.encoding.fake_quantize(layer.weight), layer.encoding, None


def branch_of(
    error: Matrix, moments: LayerMoments, rank: int, *, centred: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The branch of a rank that leaves the least mean squared output error of a matrix product's error E.

    Args:
        error: E, (out, in).
        moments: of the input; in blocks, what features of different blocks have in common is left out.
        rank: at most the smaller of E's sizes.
        centred: means don't count.

    Returns:
        down (rank, in) and up (out, rank), whose rows and columns are scaled, by powers of two, to about the same size.

    Raises:
        FloatingPointError: the moments aren't finite.
    """
    second = moments.second("xx", centred=centred)
    if not np.isfinite(second).all():
        raise FloatingPointError("the squares of its inputs overflow float32")
    parts = split_columns(error[None], moments.blocks)
    if len(error) <= error.shape[1]:
        gram = np.einsum("gok,gpk->op", parts @ second, parts, optimize=True)
        up = np.linalg.eigh(gram)[1][:, : -rank - 1 : -1]
    else:
        values, vectors = np.linalg.eigh(second)
        roots = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
        whitened = np.concatenate(list(parts @ roots), axis=1)
        right = np.linalg.eigh(whitened.T @ whitened)[1][:, : -rank - 1 : -1]
        up = np.linalg.qr(whitened @ right)[0]
    # Eigenvectors have no sign of their own: the largest entry is positive, so that every backend finds the same.
    up = up * np.sign(np.take_along_axis(up, np.abs(up).argmax(axis=0)[None], axis=0))
    down = up.T @ error
    sizes = np.abs(down).max(axis=1) / np.abs(up).max(axis=0)
    steps = np.exp2(np.round(np.log2(np.where(sizes > 0, sizes, 1)) / 2))
    return (down / steps[:, None]).astype(np.float32), (up * steps).astype(np.float32)


def output_power(matrix: NDArray[np.floating], moments: LayerMoments, *, centred: bool = False) -> float:
    """Mean square of M x, summed over outputs."""
    parts = split_columns(matrix[None].astype(np.float64), moments.blocks)
    second = moments.second("xx", centred=centred)
    return max(float(np.einsum("gok,gok->", parts @ second, parts)), 0.0)


def _in_half(matrix: NDArray[np.float32], type: str) -> NDArray[np.float32]:
    """As the simulation has it, so that the figures are those of what is put in."""
    return cast_float(matrix, "float16" if type == "float16" else "bfloat16")


def _report(
    results: Mapping[OpId, LayerResult], skipped: Mapping[OpId, str], types: Mapping[OpId, str], s: LowRankSettings
) -> Report:
    columns = ("layer", "error before", "error after", "parameters", "type", "seconds")
    rows: list[tuple[Any, ...]] = []
    solved = {id: r for id, r in results.items() if not r.left}
    for id, r in solved.items():
        f = r.figures
        type = types[id] if r.extra else "no branch"
        rows.append((id, f["before"], f["after"], int(f["parameters"]), type, f["seconds"]))
    left = {**{id: r.left for id, r in results.items() if r.left}, **skipped}
    rows += [(id, reason, "", "", "", "") for id, reason in left.items()]
    branches = [r for r in solved.values() if r.extra]

    def total(key: str) -> float:
        return float(sum(r.figures[key] for r in solved.values()))

    figures = {
        "layers": float(len(solved)),
        "branches": float(len(branches)),
        "parameters": total("parameters"),
        "seconds": total("seconds"),
    }
    if not solved:
        return Report(_summary_of_none(skipped), figures, columns, tuple(rows))
    share = 100 * (1 - total("after") / total("before")) if total("before") > 0 else 0.0
    summary = (
        f"{len(branches)} of {len(solved)} layers have a branch of rank {s.rank} beside their weight, {s.rounding} "
        f"before; output error {share:.0f} % below that, {total('parameters') / 1e6:.3g} million parameters more"
    )
    if any(types[id] not in (*_HALF, FLOAT) for id, r in solved.items() if r.extra):
        summary += "; errors are those of branches in float, which their own grids add to"
    return Report(summary, figures, columns, tuple(rows))


def _summary_of_none(skipped: Mapping[OpId, str]) -> str:
    first = next(iter(skipped.items()), None)
    return "no linear layer to correct" + ("" if first is None else f"; {first[0]}: {first[1]}")
