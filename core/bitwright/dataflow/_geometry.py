"""Convolutions and windows over all axes of a tensor, as XLA and its kin have them, in canonical terms."""

from __future__ import annotations

from collections.abc import Sequence

from bitwright.dataflow._layouts import Layout
from bitwright.graph import ConvAttrs, PoolAttrs

Pads = Sequence[tuple[int, int]]


def general_convolution(
    kernel: Sequence[int],
    order: Sequence[int],
    strides: Sequence[int],
    pads: Pads,
    input_dilation: Sequence[int],
    kernel_dilation: Sequence[int],
    groups: int,
) -> tuple[str, ConvAttrs, Layout] | None:
    """A convolution over spatial axes, or the transposed one that it is where its input is dilated.

    Args:
        kernel: shape of the kernel, as the framework has it.
        order: its axes in the order (out, in of a group, *spatial).
        strides, pads, input_dilation, kernel_dilation: for each spatial axis.
        groups: of channels.

    Returns:
        The ONNX operator, its attributes, and the layout from the kernel to the canonical weight; None where it is
        neither.
    """
    shape = [kernel[i] for i in order]
    out, inner, size = shape[0], shape[1], tuple(shape[2:])
    layout, dilations = Layout().permuted(*order), tuple(kernel_dilation)
    if all(d == 1 for d in input_dilation):
        given = tuple((low, high) for low, high in pads)
        if any(n < 0 for pad in given for n in pad):
            return None
        return "Conv", ConvAttrs(size, tuple(strides), dilations, given, groups), layout
    reach = [d * (k - 1) for d, k in zip(dilations, size, strict=True)]
    extra = tuple(max(0, high - r) for r, (_, high) in zip(reach, pads, strict=True))
    cut = tuple((r - low, r - high + e) for r, (low, high), e in zip(reach, pads, extra, strict=True))
    if any(s != 1 for s in strides) or any(n < 0 for pad in cut for n in pad):
        return None
    axes = tuple(range(2, len(shape)))
    parts = (groups, out // groups, inner, *size)
    layout = layout.reshaped(shape, parts).permuted(0, 2, 1, *(a + 1 for a in axes))
    layout = layout.reshaped((groups, inner, out // groups, *size), (groups * inner, out // groups, *size))
    if groups == 1:
        layout = Layout().permuted(*order).permuted(1, 0, *axes)
    attrs = ConvAttrs(size, tuple(input_dilation), dilations, cut, groups, extra if any(extra) else ())
    return "ConvTranspose", attrs, layout.flipped(*axes)


def pool_window(
    size: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Pads
) -> tuple[PoolAttrs, int] | None:
    """A window over all axes of (samples, …): the pool, and the axis of its channels, the last one or the second.

    Returns:
        None where it isn't a window over spatial axes alone.
    """
    rank = len(size)
    channel = rank - 1 if size[-1] == 1 else 1
    for axis in (0, channel):
        if rank < 3 or size[axis] != 1 or strides[axis] != 1 or tuple(pads[axis]) != (0, 0):
            return None
    axes = [i for i in range(1, rank) if i != channel]
    window = ConvAttrs(
        tuple(size[i] for i in axes),
        tuple(strides[i] for i in axes),
        tuple(dilations[i] for i in axes),
        tuple((pads[i][0], pads[i][1]) for i in axes),
    )
    return PoolAttrs(window=window), channel
