"""Saturation of int16 intermediate sums: which channels of a layer can meet it, proved from the codes.

On x64 without VNNI (AVX2, AVX-512 without VNNI, SSE 4.1) integer kernels multiply uint8 activations with int8 weights
by `vpmaddubsw`: a₁·w₁ + a₂·w₂ of two neighbours is added in int16 and *saturates* before it reaches the int32
accumulator. The sum can't saturate where, over the codes 0 … A of the activation,

    A · (max(w₁, 0) + max(w₂, 0)) ≤ 32 767   and   A · (min(w₁, 0) + min(w₂, 0)) ≥ −32 768.

Zero points don't enter: kernels multiply the stored codes and correct for zero points outside (signed activations are
moved to uint8 before, by 128). Which products are neighbours is the order of the matrix product: the kernel's positions
outside, a group's input channels inside, from the first one on in twos; an odd one out is added to 0. It is the same
in ONNX Runtime's packed and unpacked products, matrix-vector products and direct convolutions (MLAS: QgemmU8X8Kernel*,
QgemvU8S8Kernel*, ConvSymKernel*, `qlinearconv.cc`), and was measured for 1.32 on AVX2 and on AVX-512 without VNNI.
Depthwise convolutions add in int32. ARM's kernels without dot products add two products of int8 too, and wrap around
only where both are (−128)·(−128); which two that are isn't relied upon.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import Op, columns, groups_of
from bitwright.grids import HIGHEST, LOWEST, Encoding, in_order, pair_sums, row_chunks


@dataclass(frozen=True)
class Bound:
    """What the codes of a layer's weight allow.

    Attributes:
        highest, lowest: of each output channel, the largest and least pair sum over all activations.
        extremes: of each output channel, how many codes are −128.
    """

    highest: NDArray[np.int64]
    lowest: NDArray[np.int64]
    extremes: NDArray[np.int64]

    @property
    def channels(self) -> NDArray[np.bool_]:
        """Output channels in which a pair can saturate (or wrap around, on ARM)."""
        return (self.highest > HIGHEST) | (self.lowest < LOWEST) | (self.extremes > 1)


def bound(codes: NDArray[np.integer], activation_bits: int = 8) -> Bound:
    """The proof for one weight.

    Args:
        codes: stored int8 codes in canonical layout (out, in/groups, *kernel) or (out, in).
        activation_bits: width of the input's codes.
    """
    rows, top = in_order(np.asarray(codes)), 2**activation_bits - 1
    highest, lowest, extremes = np.zeros((3, len(rows)), np.int64)
    for part in row_chunks(rows):
        high, low = pair_sums(rows[part].astype(np.int16))
        highest[part], lowest[part] = high.max(axis=1, initial=0), low.min(axis=1, initial=0)
        extremes[part] = (rows[part] == -128).sum(axis=1)
    return Bound(top * highest, top * lowest, extremes)


def accumulate(
    op: Op, codes: NDArray[np.integer], inputs: Encoding, weight_codes: NDArray[np.integer], channel_axis: int | None
) -> tuple[NDArray[np.int64], int]:
    """The accumulators of a kernel that saturates: exactly what `vpmaddubsw` leaves of Σ (a − z)·w.

    Args:
        op: a convolution or linear op; groups that share no inputs are taken as they are.
        codes: of the input, a batch.
        inputs: the input's per-tensor encoding.
        weight_codes: int8 codes with zero point 0, canonical layout.
        channel_axis: of the input.

    Returns:
        (out, rows) with rows over samples and positions, and how many pair sums saturated.
    """
    groups = groups_of(op)
    zero = int(inputs.zero_point) - inputs.grid.qmin
    centred = np.asarray(codes, np.float32) - float(int(inputs.zero_point))
    weights = in_order(np.asarray(weight_codes, np.int64)).reshape(groups, len(weight_codes) // groups, -1)
    taps = int(np.prod(weight_codes.shape[2:])) if weight_codes.ndim > 2 else 1
    parts, lost = [], 0
    for chunk in columns(op, centred, channel_axis):
        raw = np.asarray(chunk, np.int64) + zero
        by_channel = raw.reshape(groups, -1, taps, raw.shape[-1])
        ordered = by_channel.transpose(0, 2, 1, 3).reshape(groups, -1, raw.shape[-1])
        sums = np.empty((groups, weights.shape[1], raw.shape[-1]), np.int64)
        for g, out, products in _products(weights, ordered):
            kept = np.clip(products, LOWEST, HIGHEST)
            lost += int((kept != products).sum())
            sums[g, out] = kept.sum(axis=0)
        parts.append(sums - zero * weights.sum(axis=2)[:, :, None])
    return np.concatenate(parts, axis=2).reshape(len(weight_codes), -1), lost


def _products(weights: NDArray[Any], columns: NDArray[Any]) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Pair sums (⌈K/2⌉, rows) of each group and output channel."""
    for g in range(len(weights)):
        a = columns[g]
        if len(a) % 2:
            a = np.pad(a, ((0, 1), (0, 0)))
        for out, w in enumerate(weights[g]):
            w = np.pad(w, (0, len(a) - len(w)))[:, None]
            products = w * a
            yield g, out, products[0::2] + products[1::2]
