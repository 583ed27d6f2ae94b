"""Convolution and pooling windows: TensorFlow's attributes → the canonical ones."""

from __future__ import annotations

from collections.abc import Sequence

from bitwright.graph import ConvAttrs, same_pads

Dims = Sequence[int | None]
Pads = tuple[tuple[int, int], ...]


def spatial_axes(data_format: str, rank: int) -> tuple[int, ...]:
    """Spatial axes of an activation."""
    return tuple(range(2, rank)) if data_format.startswith("NC") else tuple(range(1, rank - 1))


def channel_axis(data_format: str, rank: int) -> int:
    """Where channels lie."""
    return 1 if data_format.startswith("NC") else rank - 1


def window_pads(
    padding: str,
    explicit: Sequence[int],
    axes: Sequence[int],
    sizes: Dims,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Pads | None:
    """Explicit (begin, end) padding of each spatial axis.

    Args:
        padding: SAME, VALID or EXPLICIT.
        explicit: (begin, end) of every axis of the activation, flat.
        axes: spatial axes.
        sizes: of the input along `axes`.
        kernel, strides, dilations: along `axes`.

    Returns:
        None where SAME depends on a size that isn't fixed.
    """
    if padding == "VALID":
        return ((0, 0),) * len(axes)
    if padding == "EXPLICIT":
        return tuple((int(explicit[2 * a]), int(explicit[2 * a + 1])) for a in axes)
    return same_pads(sizes, kernel, strides, dilations)


def transposed(
    padding: str,
    explicit: Sequence[int],
    axes: Sequence[int],
    inputs: Dims,
    outputs: Dims,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> tuple[Pads, tuple[int, ...]] | None:
    """Padding and output padding of a transposed convolution, the gradient of one that maps `outputs` to `inputs`.

    Returns:
        None where they depend on a size that isn't fixed.
    """
    pads, extras = [], []
    for i, (n, m, k, s, d) in enumerate(zip(inputs, outputs, kernel, strides, dilations, strict=True)):
        reach = d * (k - 1) + 1
        if n is None or m is None:
            return None
        full = (n - 1) * s + reach
        if padding == "EXPLICIT":
            begin, end = int(explicit[2 * axes[i]]), int(explicit[2 * axes[i] + 1])
        elif padding == "VALID":
            begin = end = 0
        else:
            total = max(full - m, 0)
            begin, end = total // 2, total - total // 2
        pads.append((begin, end))
        extras.append(m - (full - begin - end))
    return (tuple(pads), tuple(extras)) if all(e >= 0 for e in extras) else None


def pool_window(
    padding: str, explicit: Sequence[int], axes: Sequence[int], sizes: Dims, kernel: Sequence[int],
    strides: Sequence[int],
) -> ConvAttrs | None:  # fmt: skip
    """Window of a pooling op; None where its padding isn't fixed."""
    ones = (1,) * len(kernel)
    pads = window_pads(padding, explicit, axes, sizes, kernel, strides, ones)
    return None if pads is None else ConvAttrs(tuple(kernel), tuple(strides), ones, pads)
