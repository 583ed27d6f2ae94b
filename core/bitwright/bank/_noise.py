"""Noise that rounding brings, in closed form from a bank: of a layer's weights at its output, of a tensor's values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright.bank._bank import Bank
from bitwright.errors import InputError
from bitwright.graph import Op, split_columns, to_matrix
from bitwright.grids import Encoding

_WITHIN = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
"""Places in a bin at which its values are taken to lie."""


def weight_noise(bank: Bank, op: Op, weight: NDArray[np.floating], encoding: Encoding) -> float:
    """Power of the output's error from rounding a weight to its grid, relative to the output's: δᵀHδ / wᵀHw.

    Args:
        bank: with the layer's moments; H has its means taken out, as a bias absorbs them. Kept in blocks, H is as if
            they had nothing to do with one another.
        op: the layer.
        weight: in canonical layout.
        encoding: its grid.

    Raises:
        InputError: the bank has no moments of the layer.
    """
    if op.id not in bank.record.layers:
        reason = bank.record.left_out.get(op.id, "it was not collected")
        raise InputError(f"bank {str(bank.path)!r} has no moments of {op.id!r} ({reason})")
    moments, _, _ = bank.layer(op).centred()
    given = np.asarray(weight, np.float32)
    rounded = encoding.fake_quantize(given)
    exact, there = (split_columns(to_matrix(op, m), bank.blocks(op)).astype(np.float64) for m in (given, rounded))
    error = there - exact
    noise, signal = (float(np.einsum("grk,grk->", m @ moments, m)) for m in (error, exact))
    return _ratio(noise, signal)


def tensor_noise(bank: Bank, tensor: str, encoding: Encoding) -> float:
    """Power of the error from putting a tensor's values on a grid, relative to their own; clipping counts.

    Raises:
        InputError: the bank has no histogram of the tensor, or the grid has several scales.
    """
    if tensor not in bank.record.tensors:
        raise InputError(f"bank {str(bank.path)!r} knows nothing of tensor {tensor!r}")
    if encoding.scale.ndim:
        raise InputError(f"{tensor!r} has a scale for each channel, of which a bank has no histograms")
    bins = bank.histogram(tensor).bins()
    low, high, count = bins.low[0], bins.high[0], bins.count[0]
    values = (low + (high - low) * _WITHIN[:, None]).astype(np.float32)
    lost = np.square(encoding.fake_quantize(values) - values.astype(np.float64)).mean(axis=0)
    power = np.square(values, dtype=np.float64).mean(axis=0)
    return _ratio(float(count @ lost), float(count @ power))


def _ratio(noise: float, signal: float) -> float:
    return max(noise, 0.0) / max(signal, float(np.finfo(np.float64).tiny)) if noise > 0 else 0.0
