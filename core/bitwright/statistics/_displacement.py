"""Second moments of a thin convolution's columns without its columns, in which every value comes once for each tap.

What taps (i, j) and (k, l) read lies (k − i, l − j) apart, wherever it lies. So the product of two taps, summed over a
convolution's positions, is the image's correlation with itself at that displacement, over the part of it that both taps
sweep: for each displacement along a row, the products of all rows near one another are one matrix product, and those of
two taps are runs of its diagonals. Along the rows all values are taken, and those that a tap misses at the border are
taken away again. A stride parts rows into interleaved ones; taps meet values of one of them each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import ConvAttrs, output_spatial

Products = NDArray[np.float64]
CHUNK_BYTES = 16 * 2**20
"""Of the samples that are correlated at a time."""
ROWS = 16
"""That are multiplied with those near them at a time."""


class Sweep(NamedTuple):
    """What two taps read together along one axis, in a line of which a stride has left every so many values.

    Attributes:
        taps: the two.
        lines: which of the interleaved lines each reads.
        shift: how much further the second one is in its line.
        start, stop: of the first one's places.
    """

    taps: tuple[int, int]
    lines: tuple[int, int]
    shift: int
    start: int
    stop: int


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution."""

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    positions: int

    def length(self, line: int) -> int:
        """Of an interleaved line."""
        return -(-(self.size - line) // self.stride)

    @cached_property
    def reach(self) -> int:
        """Between the first and the last tap."""
        return (self.kernel - 1) * self.dilation

    @cached_property
    def sweeps(self) -> list[Sweep]:
        """Of all pairs of taps that ever meet inside of the image."""
        found = []
        begins = [divmod(tap * self.dilation - self.before, self.stride) for tap in range(self.kernel)]
        for (i, (at, line)), (k, (other_at, other)) in product(enumerate(begins), repeat=2):
            first = max(0, -at, -other_at)
            last = min(self.positions, self.length(line) - at, self.length(other) - other_at)
            if first < last:
                found.append(Sweep((i, k), (line, other), other_at - at, at + first, at + last))
        return found

    @cached_property
    def swept(self) -> NDArray[np.float64]:
        """(size, taps, taps): 1 where the first tap comes by while the second is inside of the image."""
        found = np.zeros((self.size, self.kernel, self.kernel))
        for sweep in self.sweeps:
            found[(np.arange(sweep.start, sweep.stop) * self.stride + sweep.lines[0], *sweep.taps)] = 1
        return found

    def blocks(self) -> Iterator[_Block]:
        """The axis in pieces of about `ROWS`."""
        count = max(1, round(self.size / ROWS))
        edges = [self.size * n // count for n in range(count + 1)]
        for low, high in pairwise(edges):
            yield _Block.of(self, low, high)


@dataclass(frozen=True)
class _Block:
    """Some rows, those near them (`far`), and where in the products of both the diagonals of pairs of taps lie."""

    near: slice
    far: slice
    places: NDArray[np.intp]
    pick: NDArray[np.float64]
    """(places, pairs of taps): 1 where a place belongs to a pair."""
    taps: tuple[NDArray[np.intp], NDArray[np.intp]]

    @classmethod
    def of(cls, axis: Axis, low: int, high: int) -> _Block:
        near, far = slice(low, high), slice(max(0, low - axis.reach), min(axis.size, high + axis.reach))
        pairs = []
        for sweep in axis.sweeps:
            rows = np.arange(sweep.start, sweep.stop) * axis.stride + sweep.lines[0]
            rows = rows[(rows >= low) & (rows < high)]
            others = rows + (sweep.taps[1] - sweep.taps[0]) * axis.dilation
            pairs.append((rows - low) * (far.stop - far.start) + others - far.start)
        places, where = np.unique(np.concatenate([*pairs, np.zeros(0, np.intp)]), return_inverse=True)
        pick = np.zeros((len(places), len(pairs)))
        pick[where, np.repeat(np.arange(len(pairs)), [len(p) for p in pairs])] = 1
        first, second = np.array([s.taps for s in axis.sweeps], np.intp).reshape(-1, 2).T
        return cls(near, far, places, pick, (first, second))

    def sums(self, products: NDArray[np.float32]) -> Products:
        """Products (…, near, far) → what each pair of taps has of them, (…, pairs)."""
        flat = products.reshape(*products.shape[:-2], products.shape[-2] * products.shape[-1])
        return flat.take(self.places, axis=-1).astype(np.float64) @ self.pick


@dataclass(frozen=True)
class Centred:
    """A batch of inputs, to be taken about a number for each channel.

    Attributes:
        values: (samples, channels, *spatial), finite.
        total: the sum of the samples, (channels, *spatial).
        centre: (channels,), exact in float32.
    """

    values: NDArray[np.float32]
    total: NDArray[np.float64]
    centre: NDArray[np.float64]


def centred_products(attrs: ConvAttrs, a: Centred, b: Centred) -> Products:
    """Sum over samples and positions of the outer products of columns, from whose features centres are taken.

    Where a tap lies outside of the image its feature is 0, less the centre.

    Returns:
        As ``sum((x - c) @ (y - d).T)`` over `columns` of a batch and of another, or of one (`a` is `b`), (groups, K,
        K): a few rows are summed in float32, and their sums in float64.
    """
    found = by_displacement(attrs, a, b)
    samples, groups, width = len(a.values), attrs.groups, a.values.shape[1] // attrs.groups
    axes = _axes(attrs, a.values.shape[2:])
    positions = int(np.prod([axis.positions for axis in axes]))
    inside, _ = _swept(np.ones((1, *a.values.shape[2:])), axes, pairs=True)
    moved = (a.centre != 0) | (b.centre != 0)
    if not moved.any() or (inside == positions).all():
        return found
    some = moved.reshape(groups, width).any(axis=1)
    chosen, taps = np.repeat(some, width), inside.shape[-1]

    def outside(x: Centred) -> tuple[Products, Products]:
        """Centres as features (groups, K), and sums of features where another one is outside, (groups, K, K)."""
        rest = (x.total - samples * x.centre.reshape(-1, *[1] * len(axes)))[chosen]
        met, alone = _swept(rest, axes, pairs=True)
        lost = np.tile((alone[..., None] - met).reshape(-1, width * taps, taps), width)
        return x.centre[chosen].reshape(-1, width).repeat(taps, axis=1), lost

    c, lost = outside(a)
    d, other = (c, lost) if a is b else outside(b)
    seen = np.diagonal(inside[0])
    empty = np.tile(samples * (positions - seen[:, None] - seen + inside[0]), (width, width))
    found[some] += empty * c[:, :, None] * d[:, None] - lost * d[:, None] - c[:, :, None] * _turned(other)
    return found


def column_sums(attrs: ConvAttrs, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Of one input (channels, *spatial): the sum of a convolution's columns, (groups, K), and how many they are."""
    axes = _axes(attrs, x.shape[1:])
    _, alone = _swept(x, axes, pairs=False)
    return alone.reshape(attrs.groups, -1), int(np.prod([axis.positions for axis in axes]))


def _axes(attrs: ConvAttrs, spatial: tuple[int, ...]) -> list[Axis]:
    before = (begin for begin, _ in attrs.pads)
    along = spatial, attrs.kernel, attrs.strides, attrs.dilations, before, output_spatial(spatial, attrs)
    return [Axis(*values) for values in zip(*along, strict=True)]


def _swept(x: NDArray[np.float64], axes: Sequence[Axis], *, pairs: bool) -> tuple[Products, NDArray[np.float64]]:
    """Sums of (channels, *spatial) over what each tap sweeps, (channels, taps); and, if `pairs`, over the part of it at
    which another tap is inside too, (channels, taps, taps)."""
    alone = both = x
    for axis in axes:  # the next spatial axis comes first, taps are put last
        alone = np.tensordot(alone, np.einsum("yii->yi", axis.swept), (1, 0))
        both = np.tensordot(both, axis.swept, (1, 0)) if pairs else both
    rank, taps = len(axes), int(np.prod([axis.kernel for axis in axes]))
    if pairs:
        both = both.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)).reshape(-1, taps, taps)
    return both, alone.reshape(-1, taps)


def by_displacement(attrs: ConvAttrs, a: Centred, b: Centred) -> Products:
    """`centred_products` where features outside of the image are 0 (attrs: one or two spatial axes)."""
    axes = _axes(attrs, a.values.shape[2:])
    if len(axes) == 1:
        axes.insert(0, Axis(1, 1, 1, 1, 0, 1))
    rows, cols = axes
    groups, width, kernel = attrs.groups, a.values.shape[1] // attrs.groups, (rows.kernel, cols.kernel)
    total = np.zeros((*kernel, *kernel, groups, width, width))
    blocks = list(rows.blocks())
    step = max(1, CHUNK_BYTES // max(1, a.values[:1].nbytes))
    for start in range(0, len(a.values), step):
        first = _Images(a, slice(start, start + step), groups, cols)
        second = first if a is b else _Images(b, slice(start, start + step), groups, cols)
        _correlate(total, first, second, blocks, cols)
    features = width * kernel[0] * kernel[1]
    return np.ascontiguousarray(total.transpose(4, 5, 0, 1, 6, 2, 3)).reshape(groups, features, features)


def _correlate(total: Products, a: _Images, b: _Images, blocks: list[_Block], cols: Axis) -> None:
    """Add all products to (rows, columns of the first tap, those of the second, groups, channels, channels)."""
    meetings: dict[tuple[tuple[int, int], int], list[Sweep]] = {}
    for sweep in cols.sweeps:
        meetings.setdefault((sweep.lines, sweep.shift), []).append(sweep)
    for (lines, shift), sweeps in meetings.items():
        here, back = (*lines, shift), (*lines[::-1], -shift)
        if a is b and here > back:
            continue  # the other way round it is the same
        ends = max(0, -shift), min(cols.length(lines[0]), cols.length(lines[1]) - shift)
        missed = [[*range(ends[0], s.start), *range(s.stop, ends[1])] for s in sweeps]
        border = sorted({at for ats in missed for at in ats})
        whole: Products | float = 0.0
        single = np.zeros((len(border), 1, 1, 1, 1))
        for block in blocks:
            whole = whole + block.sums(_products(a.rows(lines[0], block.near), b.rows(lines[1], block.far, shift)))
            if border:
                theirs = b.columns(lines[1], [at + shift for at in border], block.far)
                single = single + block.sums(_products(a.columns(lines[0], border, block.near), theirs))
        i, k = blocks[0].taps
        for sweep, ats in zip(sweeps, missed, strict=True):
            part = np.moveaxis(whole - single[[border.index(at) for at in ats]].sum(axis=0), -1, 0)
            j, other = sweep.taps
            total[i, j, k, other] += part
            if a is b and here < back:
                total[k, other, i, j] += _turned(part)


def _products(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """(…, channels, near, n) and (…, channels, far, n) → (…, channels, channels, near, far)."""
    return a[..., :, None, :, :] @ _turned(b)[..., None, :, :, :]


def _turned(values: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.swapaxes(values, -1, -2)


class _Images:
    """The images of a batch, parted along their rows; a row of all samples is one vector.

    Behind each row are zeros, as many as a displacement can reach beyond it.
    """

    def __init__(self, batch: Centred, some: slice, groups: int, cols: Axis) -> None:
        x, centre = batch.values[some], batch.centre.astype(np.float32)[:, None, None, None]
        x = x if x.ndim == 4 else x[:, :, None]
        self._margin = max((abs(s.shift) for s in cols.sweeps), default=0)
        samples, channels, height = x.shape[:3]
        self._shape = groups, channels // groups, height, samples * (cols.length(0) + self._margin)
        self._flat: dict[int, NDArray[np.float32]] = {}
        self._wide: dict[int, NDArray[np.float32]] = {}
        for line in {line for s in cols.sweeps for line in s.lines}:
            part = x[..., line :: cols.stride].transpose(1, 2, 0, 3)
            flat = np.zeros((channels, height * self._shape[-1] + 2 * self._margin), np.float32)
            wide = flat[:, self._margin : self._margin + height * self._shape[-1]]
            self._wide[line] = wide.reshape(channels, height, samples, -1)
            np.subtract(part, centre, out=self._wide[line][..., : part.shape[-1]])
            self._flat[line] = flat

    def rows(self, line: int, rows: slice, shift: int = 0) -> NDArray[np.float32]:
        """Rows of all samples, moved along themselves: (groups, channels, rows, values)."""
        begin = self._margin + shift
        flat = self._flat[line]
        return flat[:, begin : begin + self._shape[2] * self._shape[3]].reshape(self._shape)[:, :, rows]

    def columns(self, line: int, at: list[int], rows: slice) -> NDArray[np.float32]:
        """Some of their columns: (columns, groups, channels, rows, samples)."""
        picked = self._wide[line][:, rows][..., at]
        return np.ascontiguousarray(np.moveaxis(picked, -1, 0)).reshape(len(at), *self._shape[:2], *picked.shape[1:3])
