"""One layer of a walk, wherever its moments come from: solved, judged, and kept as plain arrays."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Params
from bitwright.errors import InputError, ModelError
from bitwright.graph import Op, OpId, ParamRole, groups_of, input_channels, split_columns, to_matrix
from bitwright.grids import Blockwise, Encoding, encoding_arrays, encoding_of_arrays
from bitwright.placement import SiteId
from bitwright.statistics import SCARCE, LayerMoments
from bitwright.technique import Layer, LayerResult, Solve

GIB = 2**30
NARROWEST = 16
"""Input channels of a block: there is little to make up for between fewer."""
_EXTRA = "extra/"
"""What names of `LayerResult.extra` begin with in a store."""
NUMERICAL = (np.linalg.LinAlgError, FloatingPointError, OverflowError)
"""What a solver raises where a layer's numbers are beyond it: that layer is left, and the walk goes on."""


def layer_of(params: Params, op: Op, moments: LayerMoments, encodings: Mapping[SiteId, Encoding]) -> Layer:
    """What a technique sees of a layer.

    Args:
        params: float weights and biases.
        op: the layer.
        moments: of its input.
        encodings: in force.

    Raises:
        InputError: the weight has no encoding, or no data reached the layer.
    """
    if moments.count == 0:
        raise InputError("the calibration data are empty; give at least one batch")
    bias = op.params.get(ParamRole.BIAS)
    weight, encoding = _weight(params, op, encodings)
    return Layer(op, weight, None if bias is None else np.asarray(params[bias], np.float32), moments, encoding)


def left_at_nearest(params: Params, op: Op, encodings: Mapping[SiteId, Encoding], reason: str) -> LayerResult:
    """The result of a layer that isn't solved.

    Raises:
        InputError: the weight has no encoding.
    """
    weight, encoding = _weight(params, op, encodings)
    return _left(weight, encoding, reason)


def _weight(params: Params, op: Op, encodings: Mapping[SiteId, Encoding]) -> tuple[NDArray[np.float32], Encoding]:
    assert op.weight is not None
    encoding = encodings.get(op.weight)
    if encoding is None:
        raise InputError(f"{op.id!r}: its weight {op.weight!r} isn't quantized by the target; exclude the op")
    return np.asarray(params[op.weight], np.float32), encoding


def _left(weight: NDArray[np.float32], encoding: Encoding, reason: str) -> LayerResult:
    return LayerResult(encoding.fake_quantize(weight), encoding, left=reason)


def solution(solve: Solve, layer: Layer) -> LayerResult:
    """What a solver makes of a layer; where that is no weight, the layer rounded to nearest, and why.

    Raises:
        ModelError: the solver returned a weight of another shape.
    """
    begin = time.perf_counter()
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what isn't finite in the end is noticed
            result = solve(layer)
    except NUMERICAL as error:
        return _left(layer.weight, layer.encoding, f"it couldn't be solved ({type(error).__name__}: {error})")
    if result.weight.shape != layer.weight.shape:
        raise ModelError(f"{layer.op.id!r}: a weight of shape {result.weight.shape} for {layer.weight.shape}")
    found = (result.weight, result.encoding.scale, result.bias, *result.extra.values())
    if not all(np.isfinite(v).all() for v in found if v is not None):
        return _left(layer.weight, layer.encoding, "its solution isn't finite")
    figures = {**result.figures, "seconds": time.perf_counter() - begin}
    if layer.moments.blocks > 1:
        figures["blocks"] = float(layer.moments.blocks)
    if layer.moments.scarce:
        figures["columns_per_feature"] = layer.moments.per_feature
    if layer.moments.has_products and not figures.keys() & {"loss", "after"}:  # it has measured that itself
        figures["loss"] = reconstruction_loss(layer.op, layer.weight, result.weight, layer.moments)
    return replace(result, figures=figures)


def reconstruction_loss(
    op: Op, weight: NDArray[np.float32], candidate: NDArray[np.float32], moments: LayerMoments
) -> float:
    """Mean squared output error of a layer relative to its output's power, the bias absorbing the mean difference."""
    w, v = (split_columns(to_matrix(op, m), moments.blocks).astype(np.float64) for m in (weight, candidate))
    h, hq, c = moments.centred()
    power = float(np.einsum("gok,gkl,gol->", w, h, w, optimize=True))
    error = (
        float(np.einsum("gok,gkl,gol->", v, hq, v, optimize=True))
        - 2 * float(np.einsum("gok,gkl,gol->", w, c, v, optimize=True))
        + power
    )
    return max(error, 0.0) / max(power, 1e-30)


def name_left(name: str, results: Mapping[OpId, LayerResult]) -> None:
    """Warn of the layers that weren't solved, with the reasons; `name` is what the warning begins with."""
    reasons: dict[str, list[str]] = {}
    for op, result in results.items():
        if result.left:
            reasons.setdefault(result.left, []).append(repr(op))
    if reasons:
        count = sum(map(len, reasons.values()))
        told = "; ".join(f"{', '.join(ops)}: {reason}" for reason, ops in reasons.items())
        warnings.warn(f"{name}: {count} of {len(results)} layers stay rounded to nearest: {told}", stacklevel=4)


def name_blocks(name: str, results: Mapping[OpId, LayerResult]) -> None:
    """Warn of the layers that were solved in blocks; `name` is what the warning begins with."""
    told = [f"{op!r} (in {blocks:.0f})" for op, result in results.items() if (blocks := result.figures.get("blocks"))]
    if told:
        warnings.warn(
            f"{name}: the moments of {', '.join(told)} are larger than moments_gib: they are solved in blocks of input "
            "channels that don't make up for one another's errors; raise it, or that of the bank, where memory allows",
            stacklevel=4,
        )


def name_scarce(name: str, scarce: Mapping[OpId, float]) -> None:
    """Warn of layers whose moments left positions out though few columns came, with the columns for each feature."""
    if scarce:
        told = ", ".join(f"{op!r} ({columns:.1f})" for op, columns in scarce.items())
        warnings.warn(
            f"{name}: thin leaves fewer than {SCARCE} columns for each input feature of {told}; give more samples, or "
            "count more positions by a smaller thin",
            stacklevel=4,
        )


def blocks_within(
    budget: float,
    op: Op,
    shape: tuple[int, ...],
    features: int,
    encoding: Encoding | None = None,
    *,
    paired: bool = False,
    products: bool = True,
    most: int | None = None,
    multiple_of: int = 1,
) -> tuple[int, str]:
    """The fewest equal blocks of input channels in which a layer's moments fit.

    Args:
        budget: GiB.
        op, shape: the layer and its weight's canonical shape.
        features: K of a column.
        encoding: of the weight, whose runs of one scale aren't cut; None where it isn't known yet.
        paired, products: see `LayerMoments`.
        most: so many at most; None for no limit.
        multiple_of: blocks in which they are kept already.

    Returns:
        How many, and ""; or 0 and the reason.
    """
    channels, unit = input_channels(op, shape) // groups_of(op), 1
    if encoding is not None and isinstance(encoding.granularity, Blockwise):
        unit = encoding.granularity.block_size
    for blocks in range(multiple_of, min(channels, most or channels) + 1, multiple_of):
        size = channels / blocks
        cut = blocks == 1 or (size >= NARROWEST and size % unit == 0)
        if cut and _gib(op, features, paired=paired, products=products, blocks=blocks) <= budget:
            return blocks, ""
    needed = _gib(op, features, paired=paired, products=products)
    return 0, (
        f"the moments of its {features} input features take {needed:.3g} GiB, more than the {budget:.3g} GiB of "
        "moments_gib; raise it where memory allows"
    )


def _gib(op: Op, features: int, *, paired: bool, products: bool, blocks: int = 1) -> float:
    return LayerMoments.bytes_for(op, features, paired=paired, products=products, blocks=blocks) / GIB


def dump(result: LayerResult) -> dict[str, NDArray[Any]]:
    """A result as plain arrays, for a store."""
    arrays: dict[str, NDArray[Any]] = {"weight": result.weight, **encoding_arrays(result.encoding)}
    if result.bias is not None:
        arrays["bias"] = result.bias
    arrays["figures"] = np.array(json.dumps(dict(result.figures)))
    arrays |= {f"{_EXTRA}{name}": values for name, values in result.extra.items()}
    if result.left:
        arrays["left"] = np.array(result.left)
    return arrays


def load(arrays: Mapping[str, NDArray[Any]] | None) -> LayerResult | None:
    """The result that `dump` made arrays of."""
    if arrays is None:
        return None
    return LayerResult(
        arrays["weight"],
        encoding_of_arrays(arrays),
        arrays.get("bias"),
        json.loads(str(arrays["figures"])),
        str(arrays.get("left", "")),
        {name.removeprefix(_EXTRA): values for name, values in arrays.items() if name.startswith(_EXTRA)},
    )
