"""A quantized weight as files hold it: a matrix of codes, with a scale and a zero point for each run of a row."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import ToCompile
from bitwright.errors import EncodingError, ModelError
from bitwright.graph import LINEAR_KINDS, OpKind, ParamId, ParamRole
from bitwright.grids import CODE_TABLES, Blockwise, Encoding, PerChannel, PerTensor, QuantSpec, cast_float
from bitwright.placement import SharedWith, SiteKind

MAGNITUDES = np.array([v for v in CODE_TABLES["float4e2m1"].values if v >= 0], np.float32)
"""Of E2M1, by the lower three bits of a code; the fourth is the sign."""


@dataclass(frozen=True)
class Codes:
    """A matrix on an integer grid: ``weight = (code - zero) · scale`` in float32.

    Attributes:
        codes: uint8 (rows, columns), counted from the grid's lowest code.
        scale: float32 (rows, runs).
        zero: int32 (rows, runs), counted so too.
        bits: of a code.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: NDArray[np.int32]
    bits: int

    @property
    def run(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[1] // self.scale.shape[1])

    def values(self) -> NDArray[np.float32]:
        """The weight."""
        zero, scale = (np.repeat(a, self.run, axis=1) for a in (self.zero, self.scale))
        return np.asarray((self.codes.astype(np.int32) - zero).astype(np.float32) * scale, np.float32)


def codes_of(model: ToCompile, param: ParamId) -> NDArray[np.uint8]:
    """The codes of a weight that `checked_weight` has let pass, (rows, columns), counted from the grid's lowest."""
    encoding = model.encodings[param]
    return (encoding.quantize(model.params[param]) - lowest_code(encoding)).astype(np.uint8)


def is_mxfp4(encoding: Encoding) -> bool:
    """Whether codes stand for E2M1 floats, with powers of two as scales."""
    return (encoding.float_format, encoding.scale_type) == ("float4e2m1", "float8e8m0")


def mxfp4_codes(model: ToCompile, param: ParamId) -> NDArray[np.uint8]:
    """The codes of a weight in MXFP4, (rows, columns): a sign above three bits that number the magnitudes."""
    value, encoding = model.params[param], model.encodings[param]
    floats = cast_float(np.divide(value, encoding.spread(value.shape)[0], dtype=np.float32), "float4e2m1")
    return np.asarray(np.searchsorted(MAGNITUDES, np.abs(floats)) | np.where(floats < 0, 8, 0), np.uint8)


def mxfp4_exponents(scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scales that are powers of two as E8M0 has them: the exponent plus 127."""
    return np.asarray(np.frexp(scale)[1] + 126, np.uint8)


def mxfp4_values(codes: NDArray[np.uint8], exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What codes (rows, columns) and exponents (rows, runs) stand for."""
    floats = MAGNITUDES[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))
    scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    return np.asarray(floats * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1), np.float32)


def lowest_code(encoding: Encoding) -> int:
    """Of the whole grid: what `strict` leaves out counts."""
    return encoding.grid.qmin - int(encoding.strict)


def scales_of(
    model: ToCompile, param: ParamId, run: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Scales and zero points of a weight, (rows, runs) each; zero points are counted as codes are.

    Args:
        model: to be written.
        param: a weight that `checked_weight` has let pass.
        run: columns that share a scale; divides the columns that do. None takes those.
    """
    encoding, (rows, columns) = model.encodings[param], model.graph.params[param].shape
    pair = encoding.scale, (encoding.zero_point - lowest_code(encoding)).astype(np.int32)
    if isinstance(encoding.granularity, PerTensor):
        pair = np.full((rows, 1), pair[0], np.float32), np.full((rows, 1), pair[1], np.int32)
    elif isinstance(encoding.granularity, PerChannel):
        pair = pair[0][:, None], pair[1][:, None]
    times = 1 if run is None else run_of(encoding, columns) // run
    return np.repeat(pair[0], times, axis=1), np.repeat(pair[1], times, axis=1)


def run_of(encoding: Encoding, columns: int) -> int:
    """Columns of a matrix that share a scale."""
    return encoding.granularity.block_size if isinstance(encoding.granularity, Blockwise) else columns


def quantized_params(model: ToCompile) -> list[ParamId]:
    """Parameters that the plan quantizes, in the order of the network."""
    plan = model.plan
    return [
        p
        for p in dict.fromkeys(p for op in model.graph for p in op.params.values())
        if p in model.encodings and p in plan and isinstance(plan[p].decision, QuantSpec | SharedWith)
    ]


def require_weights_only(model: ToCompile, format: str) -> None:
    """Refuse what a runtime of floats and packed weights doesn't compute.

    Raises:
        EncodingError: an activation is quantized.
    """
    rounded = [s for s in model.plan.quantized if model.plan[s].kind is SiteKind.ACTIVATION]
    if rounded:
        raise EncodingError(
            f"{format} holds weights alone, and the simulation rounds {len(rounded)} activations, {rounded[0]!r} "
            "first: what was measured isn't what its runtimes compute. Open the model with activations='float'"
        )


def checked_weight(
    model: ToCompile,
    param: ParamId,
    format: str,
    bits: tuple[int, ...],
    *,
    embeddings: bool = False,
    floats: bool = False,
) -> Encoding:
    """The encoding of a weight whose codes fit a format's matrices.

    Args:
        model: to be written.
        param: a parameter that is quantized to integers.
        format: for messages.
        bits: widths that the format has.
        embeddings: it has room for tables too.
        floats: codes may stand for floats.

    Raises:
        EncodingError: another width, a two-level scale that isn't told, or an axis that scales can't run along.
        ModelError: it isn't a matrix (outputs, inputs) of linear ops.
    """
    encoding, about, users = model.encodings[param], model.graph.params[param], model.graph.users(param)
    kinds = (*LINEAR_KINDS, OpKind.EMBEDDING) if embeddings else LINEAR_KINDS
    other = next((op for op in users if op.kind not in kinds or op.params.get(ParamRole.WEIGHT) != param), None)
    out = f"leave it in float (overrides={{{param!r}: 'float'}})"
    if other is not None:
        raise ModelError(f"{format}: {param!r} is read by {other.id!r} ({other.type}), and has no place; {out}")
    if len(about.shape) != 2 or about.layout not in (None, (0, 1)):
        held = "is held transposed" if len(about.shape) == 2 else f"has shape {about.shape}"
        raise ModelError(f"{format} holds matrices (outputs, inputs) of linear layers; {param!r} {held}: {out}")
    if encoding.float_format is not None and not floats:
        raise EncodingError(f"{format}: {param!r} is {encoding.float_format}, not on an integer grid; {out}")
    if encoding.bits not in bits:
        widths = " or ".join(map(str, bits))
        raise EncodingError(f"{format}: {param!r} has codes of {encoding.bits} bits, the format {widths}; {out}")
    layout = encoding.granularity
    if (isinstance(layout, PerChannel) and layout.axis != 0) or (
        isinstance(layout, Blockwise) and (layout.axis, layout.block_axis) != (0, 1)
    ):
        raise EncodingError(f"{format}: the scales of {param!r} run along {layout}, the format's along rows; {out}")
    return encoding


def inexact_scales(encoding: Encoding, kind: type[np.floating] = np.float16) -> int:
    """How many scales aren't numbers of a type."""
    with np.errstate(over="ignore"):
        return int((encoding.scale.astype(kind).astype(np.float32) != encoding.scale).sum())


def require_float16_scales(encoding: Encoding, param: ParamId, format: str, target: str) -> None:
    """Refuse scales that a format would round.

    Raises:
        EncodingError: there are some; names the target that has none.
    """
    if count := inexact_scales(encoding):
        raise EncodingError(
            f"{format} keeps scales as float16, and {count} of {encoding.scale.size} scales of {param!r} aren't such "
            f"numbers: rounded, they would be other weights than were measured. Simulate what the file holds: "
            f'target={target!r}, or "weight_scales": "float16" in a target\'s section bitwright'
        )


def integer_params(model: ToCompile) -> list[ParamId]:
    """Parameters that are quantized to integers, in the order of the network."""
    return [p for p in quantized_params(model) if model.encodings[p].float_format is None]


def integer_or_mxfp4_params(model: ToCompile) -> list[ParamId]:
    """Those, and what is in MXFP4."""
    return [p for p in quantized_params(model) if (e := model.encodings[p]).float_format is None or is_mxfp4(e)]


def float_params(model: ToCompile, packed: Collection[ParamId] | None = None) -> Iterator[ParamId]:
    """Parameters that aren't packed, in the order of the network; None: those that aren't quantized to integers."""
    packed = set(integer_params(model) if packed is None else packed)
    yield from (p for p in dict.fromkeys(p for op in model.graph for p in op.params.values()) if p not in packed)
