"""Entropy: the threshold whose quantized distribution tells most about the original (Kullback-Leibler divergence)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from bitwright.calibration._base import Scheme
from bitwright.calibration._density import Density, Rows
from bitwright.grids import QuantSpec

BINS = 2048
CANDIDATES = 128
CELLS = 2**20
"""Bins looked at together, for bounded memory."""


class Entropy(Scheme):
    """Threshold on the magnitude, by the method of TensorRT (Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Magnitudes are counted in equal bins (1025 to 2048 of them; fewer for small groups, so that four values fall into
    one on average); for each threshold, the counts with the outliers added to the last bin are compared with
    themselves after joining to as many levels as the grid has on that side. Exact zeros are left out, since every
    grid holds them. Where there are less than two bins a level there is nothing to compare: the full range is taken.
    """

    name = "entropy"
    precision: ClassVar[int | None] = 10
    view: ClassVar[int] = 10

    def range(self, data: Density, spec: QuantSpec) -> tuple[Rows, Rows]:
        """The data's range, cut at the threshold on both sides."""
        one_sided = bool((data.minimum >= 0).all()) and (not spec.symmetric or spec.unsigned_symmetric)
        levels = 2 ** (spec.bits if one_sided else spec.bits - 1)
        values = float(data.mass.sum(axis=1).max())
        bins = int(min(BINS, 2 ** np.floor(np.log2(max(values / 4, 1)))))
        if 2 * levels > bins:
            return data.minimum, data.maximum
        step = max(1, CELLS // bins)
        parts = [_threshold(data.rows(slice(i, i + step)), levels, bins) for i in range(0, len(data.minimum), step)]
        threshold = np.concatenate(parts)
        return np.clip(data.minimum, -threshold, threshold), np.clip(data.maximum, -threshold, threshold)


def _threshold(data: Density, levels: int, bins: int) -> Rows:
    counts, width = _linear(data, bins)
    used = bins - (counts[:, ::-1] > 0).argmax(axis=1)
    beyond = counts.sum(axis=1, keepdims=True) - np.cumsum(counts, axis=1)
    # The full range of a row is the first candidate: nothing is cut off there.
    best, least = used.copy(), np.full(len(counts), np.inf)
    for n in np.unique(used):
        rows = used == n
        least[rows] = _divergence(counts[rows], beyond[rows], levels, int(max(n, levels)))
    for n in np.unique(np.rint(np.linspace(levels, bins, CANDIDATES)).astype(int)):
        rows = used > n
        if not rows.any():
            break
        divergence = _divergence(counts[rows], beyond[rows], levels, int(n))
        better = np.flatnonzero(rows)[divergence < least[rows]]
        least[better], best[better] = divergence[divergence < least[rows]], n
    return np.asarray(np.minimum(best * width, np.maximum(-data.minimum, data.maximum)))


def _linear(data: Density, bins: int) -> tuple[Rows, Rows]:
    """Counts of magnitudes in equal bins, and their width, a power of two: no bin of a histogram is split."""
    rows = len(data.minimum)
    largest = np.maximum(np.maximum(-data.minimum, data.maximum), np.finfo(np.float32).tiny)
    width = np.exp2(np.floor(np.log2(largest)) + 1) / bins
    size = data.magnitude
    index = np.minimum(size / width[:, None], bins - 1).astype(np.intp) + bins * np.arange(rows)[:, None]
    mass = np.where(size > 0, data.mass, 0.0)
    counts = np.bincount(index.ravel(), mass.ravel(), rows * bins)
    return np.asarray(counts.reshape(rows, bins), np.float64), width


def _divergence(counts: Rows, beyond: Rows, levels: int, n: int) -> Rows:
    """KL divergence between the counts cut at n bins and their `levels`-level version, a row each."""
    kept = counts[:, :n]
    reference = kept.copy()
    reference[:, -1] += beyond[:, n - 1]
    level = np.arange(n) * levels // n
    starts = np.flatnonzero(np.diff(level, prepend=-1))
    occupied = (reference > 0).astype(np.float64)
    mean = np.add.reduceat(kept, starts, axis=1) / np.maximum(np.add.reduceat(occupied, starts, axis=1), 1)
    candidate = mean[:, np.cumsum(np.diff(level, prepend=-1) > 0) - 1] * occupied
    p = reference / np.maximum(reference.sum(axis=1, keepdims=True), 1e-300)
    q = candidate / np.maximum(candidate.sum(axis=1, keepdims=True), 1e-300)
    # A level that holds only outliers has q = 0 where p > 0: infinitely bad in theory, very bad here.
    ratio = np.where(p > 0, p / np.maximum(q, 1e-12), 1.0)
    return np.asarray((p * np.log(ratio)).sum(axis=1))
