"""ggml's blocks of 32 columns: codes of 4 or 8 bits with a float16 scale, and a float16 minimum; MXFP4's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.grids import Encoding
from bitwright_formats.codes import inexact_scales, is_mxfp4, lowest_code, mxfp4_exponents, mxfp4_values
from bitwright_formats.gguf_file import BLOCK, TYPES

HALF = np.dtype("<f2")


def block_type(encoding: Encoding, param: str) -> str:
    """The type whose blocks hold a weight's grid exactly.

    Q4_0: ``(code - 8) · d``. Q4_1: ``code · d + m``, with ``m = -zero · d``. Q8_0: ``code · d``, codes from -127 on.
    MXFP4: as OCP has it, an E8M0 scale and E2M1 floats.

    Raises:
        EncodingError: none does.
    """
    if is_mxfp4(encoding):
        return "MXFP4"
    middle, zero = 2 ** (encoding.bits - 1), encoding.zero_point - lowest_code(encoding)
    symmetric = bool((zero == middle).all())
    if encoding.bits == 8 and not symmetric:
        raise EncodingError(
            f"gguf: {param!r} has zero points, and blocks of 8 bits (Q8_0) have none; make it symmetric"
        )
    target = "gguf_q8_0" if encoding.bits == 8 else "gguf_q4_0" if symmetric else "gguf_q4_1"
    if count := inexact_scales(encoding):
        raise EncodingError(
            f"gguf keeps scales as float16, and {count} of {encoding.scale.size} scales of {param!r} aren't such "
            f"numbers: rounded, they would be other weights than were measured. Simulate what the file holds: "
            f"target={target!r}"
        )
    if symmetric:
        return "Q8_0" if encoding.bits == 8 else "Q4_0"
    minimum = -zero.astype(np.float32) * encoding.scale
    with np.errstate(over="ignore"):
        exact = minimum.astype(np.float16).astype(np.float32) == minimum
    if not exact.all():
        raise EncodingError(
            f"gguf keeps minima as float16, and {int((~exact).sum())} of {exact.size} minima (zero point · scale) of "
            f"{param!r} aren't such numbers. Simulate what the file holds: target={target!r}"
        )
    return "Q4_1"


def to_blocks(
    kind: str, codes: NDArray[np.uint8], scale: NDArray[np.float32], zero: NDArray[np.int32]
) -> NDArray[np.uint8]:
    """Codes (rows, columns) with scales and zero points (rows, blocks), as bytes (rows, bytes of a row)."""
    rows = len(codes)
    split = codes.reshape(rows, -1, BLOCK)
    parts: list[NDArray[np.uint8]] = [mxfp4_exponents(scale)[..., None] if kind == "MXFP4" else _half(scale)]
    if kind == "Q8_0":
        parts.append((split.astype(np.int16) - 128).astype(np.int8).view(np.uint8))
    else:
        if kind == "Q4_1":
            parts.append(_half(-zero.astype(np.float32) * scale))
        parts.append((split[..., : BLOCK // 2] | (split[..., BLOCK // 2 :] << 4)).astype(np.uint8))
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def from_blocks(kind: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The values of bytes, as ggml dequantizes them."""
    rows = len(data)
    blocks = data.reshape(rows, -1, TYPES[kind][2])
    if kind == "MXFP4":
        packed = blocks[..., 1:]
        codes = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(rows, -1)
        return mxfp4_values(codes, blocks[..., 0])
    scale = _number(blocks[..., :2])
    if kind == "Q8_0":
        return (blocks[..., 2:].copy().view(np.int8).astype(np.float32) * scale).reshape(rows, -1)
    packed = blocks[..., 2 if kind == "Q4_0" else 4 :]
    codes = np.concatenate([packed & 15, packed >> 4], axis=2)
    if kind == "Q4_0":
        return ((codes.astype(np.int8) - 8).astype(np.float32) * scale).reshape(rows, -1)
    return (codes.astype(np.float32) * scale + _number(blocks[..., 2:4])).reshape(rows, -1)


def _half(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values.astype(HALF)).view(np.uint8).reshape(*values.shape, 2)


def _number(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(data).view(HALF).astype(np.float32)
