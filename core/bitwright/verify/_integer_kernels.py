"""Integer kernels in numpy: what ONNX Runtime's quantized CPU kernels compute, bit for bit.

Products are accumulated exactly: integer-valued float32 matrices where every partial sum stays below 2**24,
float64 (exact below 2**53) elsewhere. Requantization is float32, as in the runtime: multiplier s_x·s_w/s_y, round
half to even, add the zero point, clip (ONNX QLinearConv-10, QLinearMatMul-21). The order of roundings in addition,
multiplication and average pooling was found by exhaustive comparison over all pairs of 8-bit codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.graph import ConvAttrs, Op, OpKind, PoolAttrs, columns, output_spatial, to_matrix
from bitwright.grids import Encoding, Grid

Codes = NDArray[np.int32]
F = np.float32
EXACT32 = 2**24
UNSIGNED = 128
"""What the runtime, told to be precise on x64, adds to signed 8-bit codes: float32 rounds there, not around zero."""


def accumulate(
    op: Op, codes: Codes, inputs: Encoding, weight_codes: Codes, channel_axis: int | None
) -> NDArray[np.float64]:
    """Exact integer accumulators Σ (q_x − z_x)·q_w of a linear op, shaped like its output, without bias.

    Args:
        op: convolution, transposed convolution or linear op.
        codes: input codes.
        inputs: the input's per-tensor encoding.
        weight_codes: weight codes minus their zero points, canonical layout.
        channel_axis: of a convolution's input.
    """
    centred = (codes - int(inputs.zero_point)).astype(F)
    matrix = to_matrix(op, weight_codes.astype(np.float64))
    reach = _reach(inputs)
    peak = float(np.abs(matrix).sum(axis=2, dtype=np.float64).max(initial=0)) * reach
    dtype: Any = F if peak < EXACT32 else np.float64
    operand = matrix.astype(dtype)
    parts = [operand @ chunk.astype(dtype, copy=False) for chunk in columns(op, centred, channel_axis)]
    flat = np.concatenate(parts, axis=2).reshape(-1, sum(p.shape[2] for p in parts)).astype(np.float64)
    return _shaped(op, flat, codes.shape, channel_axis)


def matmul(a: Codes, ea: Encoding, b: Codes, eb: Encoding) -> NDArray[np.float64]:
    """Exact integer accumulators of a product of two activations, broadcast as numpy's matmul."""
    dtype: Any = F if _reach(ea) * _reach(eb) * a.shape[-1] < EXACT32 else np.float64
    left, right = ((q - int(e.zero_point)).astype(dtype) for q, e in ((a, ea), (b, eb)))
    return np.asarray(left @ right, np.float64)


def _reach(encoding: Encoding) -> int:
    """The largest magnitude of a code minus the zero point, which lies among the codes."""
    zero, grid = int(encoding.zero_point), encoding.grid
    return max(zero - grid.qmin, grid.qmax - zero)


def _shaped(op: Op, flat: NDArray[np.float64], shape: tuple[int, ...], channel_axis: int | None) -> NDArray[np.float64]:
    """(outputs, rows) → the op's output layout."""
    if op.kind is OpKind.LINEAR:
        return flat.T.reshape(*shape[:-1], len(flat))
    attrs = op.attrs
    assert isinstance(attrs, ConvAttrs)
    axis = 1 if channel_axis is None else channel_axis % len(shape)
    spatial = tuple(n for i, n in enumerate(shape) if i not in (0, axis))
    if op.kind is OpKind.CONV_TRANSPOSE:
        extra = attrs.output_padding or (0,) * len(spatial)
        out = tuple(
            (n - 1) * s + d * (k - 1) + 1 + e - sum(p)
            for n, s, d, k, e, p in zip(
                spatial, attrs.strides, attrs.dilations, attrs.kernel, extra, attrs.pads, strict=True
            )
        )
    else:
        out = output_spatial(spatial, attrs)
    return np.moveaxis(flat.reshape(len(flat), shape[0], *out), 0, axis)


def along(values: NDArray[Any], rank: int, axis: int) -> NDArray[Any]:
    """Per-channel values, ready to broadcast along `axis` of a tensor of `rank`."""
    return values if values.ndim == 0 else values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def requantize(
    accumulators: NDArray[np.float64], scale: NDArray[np.float32], output: Encoding, low: int, high: int
) -> Codes:
    """Accumulators of scale `scale` (broadcastable) → codes of `output`, clipped to [low, high]."""
    multiplier = np.asarray(scale / output.scale, F)
    scaled = np.rint(accumulators.astype(F) * multiplier)
    return np.asarray(np.clip(scaled + F(output.zero_point), low, high), np.int32)


def requantize_with_bias(
    accumulators: NDArray[np.float64],
    scale: NDArray[np.float32],
    bias: NDArray[np.float32],
    output: Encoding,
    low: int,
    high: int,
) -> Codes:
    """As `requantize`, where the bias is an Add of its own: MatMulIntegerToFloat, Add and QuantizeLinear."""
    real = accumulators.astype(F) * scale + bias
    return np.asarray(np.clip(np.rint(real / output.scale) + F(output.zero_point), low, high), np.int32)


def add(a: Codes, ea: Encoding, b: Codes, eb: Encoding, out: Encoding, low: int, high: int) -> Codes:
    """QLinearAdd (ONNX Runtime contrib operators): fused multiply-adds from the constant part outwards."""
    ra, rb = F(ea.scale / out.scale), F(eb.scale / out.scale)
    fixed = F(F(out.zero_point) - _fma(ra, F(ea.zero_point), F(rb * F(eb.zero_point))))
    return _clip(_fma(a.astype(F), ra, _fma(b.astype(F), rb, fixed)), low, high)


def multiply(a: Codes, ea: Encoding, b: Codes, eb: Encoding, out: Encoding, low: int, high: int) -> Codes:
    """QLinearMul (ONNX Runtime contrib operators), which adds the zero point before it rounds; codes may broadcast."""
    ratio = F(F(ea.scale * eb.scale) / out.scale)
    product = (a - int(ea.zero_point)).astype(F) * (b - int(eb.zero_point)).astype(F)
    return _clip(np.asarray(product * ratio, F) + F(out.zero_point), low, high)


def softmax(codes: Codes, encoding: Encoding, axis: int, out: Encoding) -> Codes:
    """QLinearSoftmax of 8-bit codes (ONNX Runtime contrib operators): exponentials from a table of integers.

    Equal to the runtime but for one code in about a million, where its float sums round otherwise.
    """
    full = encoding.grid.qmax
    scale = min((2**32 - 1) / codes.shape[axis], 0x7FFFFF)
    table = np.rint(scale * np.exp(np.arange(-full + encoding.grid.qmin, 1) * np.float64(encoding.scale)))
    values = table[codes - codes.max(axis=axis, keepdims=True) + len(table) - 1]
    total = values.sum(axis=axis, keepdims=True)
    levels = F(np.floor(F(1) / F(out.scale)))
    shares = np.asarray(values.astype(F) * levels, F) / total.astype(F)
    return _clip(np.rint(shares) + F(out.zero_point), out.grid.qmin, out.grid.qmax)


def average_pool(
    codes: Codes, encoding: Encoding, attrs: PoolAttrs, out: Encoding, grid: Grid, channel_axis: int | None = None
) -> Codes:
    """QLinearAveragePool and QLinearGlobalAveragePool (ONNX Runtime contrib operators); by default channels first.

    The global one sums codes. That of windows sums real values in float32, in the order of the window, and adds the
    zero point before it rounds: with equal grids, where averages often lie between two codes, either decides.
    """
    if attrs.window is not None and channel_axis is not None and channel_axis % codes.ndim != 1:
        first = average_pool(np.moveaxis(codes, channel_axis, 1), encoding, attrs, out, grid)
        return np.moveaxis(first, 1, channel_axis)
    centred = codes.astype(np.int64) - int(encoding.zero_point)
    if attrs.window is None:
        count = int(np.prod([codes.shape[a] for a in attrs.axes]))
        total = centred.sum(axis=attrs.axes, keepdims=attrs.keepdims)
        multiplier = np.asarray(F(encoding.scale) / (F(out.scale) * F(count)), F)
        return _clip(np.rint(total.astype(F) * multiplier) + F(out.zero_point), grid.qmin, grid.qmax)
    real = F(encoding.scale) * centred.astype(F)
    sizes: Any = F(np.prod(attrs.window.kernel))
    if not attrs.count_include_pad and any(map(any, attrs.window.pads)):
        sizes = _window_sums(np.ones((1, 1, *codes.shape[2:]), F), attrs.window)
    steps = _window_sums(real, attrs.window) / sizes / F(out.scale)
    moved = UNSIGNED if out.signed else 0
    return _clip(steps + F(int(out.zero_point) + moved), grid.qmin + moved, grid.qmax + moved) - moved


def _window_sums(x: NDArray[np.float32], window: ConvAttrs) -> NDArray[np.float32]:
    """Sums over windows in float32, value after value in the order in which they lie; channels first."""
    padded = np.pad(x, ((0, 0), (0, 0), *window.pads))
    sizes = output_spatial(x.shape[2:], window)
    total = np.zeros((*x.shape[:2], *sizes), F)
    for place in np.ndindex(*window.kernel):
        cut = (slice(i * d, i * d + s * (n - 1) + 1, s)
               for i, d, s, n in zip(place, window.dilations, window.strides, sizes, strict=True))  # fmt: skip
        total += padded[(slice(None), slice(None), *cut)]
    return total


def _fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> NDArray[np.float32]:
    """Fused multiply-add: the product of two float32 numbers is exact in float64, so that one rounding remains."""
    return np.asarray(np.multiply(a, b, dtype=np.float64) + np.asarray(c, np.float64), F)


def _clip(values: NDArray[np.floating], low: int, high: int) -> Codes:
    return np.asarray(np.clip(np.rint(values), low, high), np.int32)
