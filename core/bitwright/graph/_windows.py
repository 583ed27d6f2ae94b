"""Padding of windows that frameworks name and don't number."""

from __future__ import annotations

from collections.abc import Sequence


def same_pads(
    sizes: Sequence[int | None], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[int, int], ...] | None:
    """(begin, end) along each axis of a window with "same" padding, which makes ⌈n/s⌉ outputs.

    total = max((⌈n/s⌉ − 1)·s + d·(k − 1) + 1 − n, 0), the odd element at the end (TensorFlow, `tf.nn`, "Notes on
    padding").

    Args:
        sizes: of the input, None where free.
        kernel, strides, dilations: of the window.

    Returns:
        None where it depends on a size that is free.
    """
    pads = []
    for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        reach = d * (k - 1) + 1
        if s == 1:
            total = reach - 1  # whatever the size
        elif n is None:
            return None
        else:
            total = max((-(-n // s) - 1) * s + reach - n, 0)
        pads.append((total // 2, total - total // 2))
    return tuple(pads)
