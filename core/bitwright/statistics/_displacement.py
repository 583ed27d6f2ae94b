"""Second moments of a thin convolution's columns without its columns, in which every value comes once for each tap.

What taps (i, j) and (k, l) read lies (k − i, l − j) apart, wherever it lies. So the product of two taps, summed over a
convolution's positions, is the image's correlation with itself at that displacement, over the part of it that both taps
sweep. Of images that lie row behind row with zeros between them, it is the dot product of one long vector with itself,
moved; what a tap misses at the border, whole rows and columns of the image, is taken away again. A stride parts an axis
into interleaved lines; taps meet values of one of them each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitwright.graph import ConvAttrs, output_spatial

Products = NDArray[np.float64]
BLOCK = 2**19
"""Values that are correlated at a time: they stay in the second-level cache (2 MiB) for all displacements."""
DOT = 2**12
"""Values that are summed in float32, about."""


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

    @property
    def turned(self) -> bool:
        """Whether of this one and of that of the taps the other way round it comes second."""
        return (self.lines, self.shift) > (self.lines[::-1], -self.shift)


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

    def meetings(self, *, half: bool = False) -> list[_Meeting]:
        """The sweeps, by the two lines that are read; with `half` one of each two that are the same turned round."""
        by_lines: dict[tuple[int, int], list[Sweep]] = {}
        for sweep in self.sweeps:
            if not (half and sweep.turned):
                by_lines.setdefault(sweep.lines, []).append(sweep)
        return [_Meeting.of(self, sweeps) for sweeps in by_lines.values()]


@dataclass(frozen=True)
class _Meeting:
    """Pairs of taps that read the same two lines of an axis, and what their sums are made of.

    Attributes:
        lines: the two.
        shifts: at which the whole lines are multiplied.
        missed: single places (shift, place of the first line) that some pair doesn't sweep.
        pick: (pairs, shifts + missed): a pair's sum is that of the lines, less the places it misses.
        taps: of the pairs.
    """

    lines: tuple[int, int]
    shifts: range
    missed: list[tuple[int, int]]
    pick: NDArray[np.float64]
    taps: tuple[NDArray[np.intp], NDArray[np.intp]]

    @classmethod
    def of(cls, axis: Axis, sweeps: Sequence[Sweep]) -> _Meeting:
        lines = sweeps[0].lines
        low, high = min(s.shift for s in sweeps), max(s.shift for s in sweeps)
        shifts = range(low, high + 1, int(np.gcd.reduce([s.shift - low for s in sweeps])) or 1)
        missed: dict[tuple[int, int], int] = {}
        entries = []
        for pair, s in enumerate(sweeps):
            begin, end = max(0, -s.shift), min(axis.length(lines[0]), axis.length(lines[1]) - s.shift)
            entries.append((pair, shifts.index(s.shift), 1))
            border = ((s.shift, place) for place in (*range(begin, s.start), *range(s.stop, end)))
            entries += [(pair, len(shifts) + missed.setdefault(at, len(missed)), -1) for at in border]
        pick = np.zeros((len(sweeps), len(shifts) + len(missed)))
        for pair, part, sign in entries:
            pick[pair, part] = sign
        first, second = np.array([s.taps for s in sweeps], np.intp).T
        return cls(lines, shifts, list(missed), pick, (first, second))


Meetings = tuple[_Meeting, _Meeting]
"""Of rows, and of columns."""


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
    moved = (a.centre != 0) | (b.centre != 0)
    if not moved.any():
        return found
    inside = _inside(attrs, a.values.shape[2:])
    if (inside == positions).all():
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


@lru_cache(maxsize=256)
def _axes(attrs: ConvAttrs, spatial: tuple[int, ...]) -> tuple[Axis, ...]:
    before = (begin for begin, _ in attrs.pads)
    along = spatial, attrs.kernel, attrs.strides, attrs.dilations, before, output_spatial(spatial, attrs)
    return tuple(Axis(*values) for values in zip(*along, strict=True))


@lru_cache(maxsize=256)
def _inside(attrs: ConvAttrs, spatial: tuple[int, ...]) -> Products:
    """At how many positions two taps are both inside of an image, (1, taps, taps)."""
    return _swept(np.ones((1, *spatial)), _axes(attrs, spatial), pairs=True)[0]


@lru_cache(maxsize=256)
def _meetings(attrs: ConvAttrs, spatial: tuple[int, ...], half: bool) -> tuple[Axis, Axis, list[Meetings]]:
    """The axes, of which there are two, and where lines of rows and of columns meet."""
    *before, cols = _axes(attrs, spatial)
    rows = before[0] if before else Axis(1, 1, 1, 1, 0, 1)
    return rows, cols, list(product(rows.meetings(), cols.meetings(half=half)))


def _swept(x: NDArray[np.float64], axes: Sequence[Axis], *, pairs: bool) -> tuple[Products, NDArray[np.float64]]:
    """Sums of (channels, *spatial) over what each tap sweeps, (channels, taps); and, if `pairs`, over the part of it at
    which another tap is inside too, (channels, taps, taps)."""
    alone = both = x
    for axis in reversed(axes):  # the last axis goes, and taps come first
        alone = np.moveaxis(alone @ np.einsum("yii->yi", axis.swept), -1, 0)
        if pairs:
            both = np.moveaxis(both @ axis.swept.reshape(axis.size, -1), -1, 0)
    rank, taps = len(axes), int(np.prod([axis.kernel for axis in axes]))
    if pairs:
        both = both.reshape(*(k for axis in axes for k in (axis.kernel, axis.kernel)), -1)
        both = both.transpose(-1, *range(0, 2 * rank, 2), *range(1, 2 * rank, 2)).reshape(-1, taps, taps)
    return both, np.ascontiguousarray(alone.reshape(taps, -1).T)


def by_displacement(attrs: ConvAttrs, a: Centred, b: Centred) -> Products:
    """`centred_products` where features outside of the image are 0 (attrs: one or two spatial axes)."""
    rows, cols, meetings = _meetings(attrs, a.values.shape[2:], a is b)
    groups, width = attrs.groups, a.values.shape[1] // attrs.groups
    sums = [np.zeros((groups, width, width, r.pick.shape[1], c.pick.shape[1])) for r, c in meetings]
    if not meetings:
        features = width * rows.kernel * cols.kernel
        return np.zeros((groups, features, features))
    # A few channels at a time are read: channels that lie last are moved once, and not each time.
    same, a = a is b, replace(a, values=np.ascontiguousarray(a.values))
    b = a if same else replace(b, values=np.ascontiguousarray(b.values))
    image = width * (rows.size + 2 * rows.reach) * (cols.size + cols.reach)  # with zeros around it, at most
    samples = max(1, min(len(a.values), 4 * BLOCK // image))
    step = max(1, BLOCK // (samples * image))
    for start, group in product(range(0, len(a.values), samples), range(0, groups, step)):
        some = slice(start, start + samples), slice(group, group + step)
        first = _Images(a, *some, width, rows, cols)
        second = first if same else _Images(b, *some, width, rows, cols)
        for total, (along_rows, along_cols) in zip(sums, meetings, strict=True):
            _correlate(total[some[1]], first, second, along_rows, along_cols)
    return _by_taps(sums, meetings, rows, cols, half=same)


def _by_taps(
    sums: Sequence[Products], meetings: Sequence[tuple[_Meeting, _Meeting]], rows: Axis, cols: Axis, *, half: bool
) -> Products:
    """Sums by the parts of meetings, (groups, channels, channels, parts, parts) → by features, (groups, K, K)."""
    groups, width = sums[0].shape[:2]
    taps = rows.kernel, rows.kernel, cols.kernel, cols.kernel
    place, begin = np.zeros(taps, np.intp), 1  # what never meets has 0
    pairs = [np.zeros((groups, width, width, 1))]
    for total, (along_rows, along_cols) in zip(sums, meetings, strict=True):
        found = (along_rows.pick @ (total @ along_cols.pick.T)).reshape(groups, width, width, -1)
        first, second = (tap[:, None] for tap in along_rows.taps)
        place[first, second, *along_cols.taps] = begin + np.arange(found.shape[-1]).reshape(len(first), -1)
        pairs.append(found)
        begin += found.shape[-1]
    turned = np.zeros(taps, bool)
    for sweep in cols.sweeps if half else ():
        if sweep.turned:
            there, back = (..., *sweep.taps), (..., *sweep.taps[::-1])
            place[there], turned[there] = place[back].T, True
    features, values = width * rows.kernel * cols.kernel, np.concatenate(pairs, axis=-1)
    order = np.transpose(place, (0, 2, 1, 3)).reshape(-1)
    result = values.take(order, axis=-1)
    if width > 1 and half:
        result = np.where(turned.transpose(0, 2, 1, 3).reshape(-1), values.swapaxes(1, 2).take(order, axis=-1), result)
    result = result.reshape(groups, width, width, rows.kernel * cols.kernel, -1)
    result = np.ascontiguousarray(result.transpose(0, 1, 3, 2, 4)).reshape(groups, features, features)
    for row in range(features if half else 0):
        # Taps that lie apart along rows were summed both ways round, which rounds otherwise.
        result[:, row + 1 :, row] = result[:, row, row + 1 :]
    return result


def _correlate(total: Products, a: _Images, b: _Images, rows: _Meeting, cols: _Meeting) -> None:
    """Add to (groups, channels, channels, parts of the meeting along rows, parts of that along columns)."""
    one, other = a.lines[rows.lines[0], cols.lines[0]], b.lines[rows.lines[1], cols.lines[1]]
    whole = len(cols.shifts)
    _add_rows(total[..., :whole], one, other, rows, cols.shifts)
    if cols.missed:
        theirs = [place + shift for shift, place in cols.missed]
        border = one.columns([place for _, place in cols.missed]), other.columns(theirs)
        _add_rows(np.moveaxis(total[..., whole:], -1, 0)[..., None], *border, rows, range(1))


def _add_rows(total: Products, a: _Rows, b: _Rows, meeting: _Meeting, along: range) -> None:
    """Add to (…, groups, channels, channels, parts of the meeting, places along the rows)."""
    whole = len(meeting.shifts)
    total[..., :whole, :] += _dots(a, b, 0, a.each, a.pieces, meeting.shifts, along)
    for n, (shift, row) in enumerate(meeting.missed, whole):
        total[..., n : n + 1, :] += _dots(a, b, row, 1, 1, range(shift, shift + 1), along)


def _dots(a: _Rows, b: _Rows, row: int, each: int, pieces: int, down: range, along: range) -> Products:
    """Products of `pieces` times `each` rows with those so many rows down and places along, summed: (…, groups,
    channels, channels, down, along). A piece is summed in float32."""
    n, place = each * a.pitch, a.values.itemsize
    (*lead, width, _), (*far, apart, _) = a.values.shape, a.values.strides
    ours, theirs = a.origin + row * a.pitch, b.origin + (row + down[0]) * b.pitch + along[0]
    one = np.ndarray(
        (*lead, width, 1, pieces, 1, 1, 1, n), np.float32, a.values, ours * place,
        (*far, apart, 0, n * place, 0, 0, 0, place),
    )  # fmt: skip
    other = np.ndarray(
        (*lead, 1, width, pieces, len(down), len(along), n, 1), np.float32, b.values, theirs * place,
        (*far, 0, apart, n * place, down.step * b.pitch * place, along.step * place, place, 0),
    )  # fmt: skip
    # numpy hands a vector's product with a vector to BLAS, and copies neither.
    found: Products = (one @ other)[..., 0, 0].sum(axis=-3, dtype=np.float64)
    return found


@dataclass(frozen=True)
class _Rows:
    """Rows of images as one vector for each channel, with rows of zeros before and behind, and more at both ends.

    Attributes:
        values: (…, groups, channels, values).
        origin: where the first row begins, whole rows from the start.
        pitch: length of a row, of all samples.
        samples: of these.
        each, pieces: rows that are multiplied at a time, and how often.
    """

    values: NDArray[np.float32]
    origin: int
    pitch: int
    samples: int
    each: int
    pieces: int

    def columns(self, at: list[int]) -> _Rows:
        """Some columns as images of their own, (columns, groups, channels, values)."""
        room = self.pitch // self.samples
        picked = np.stack([self.values[..., place::room] for place in at])
        return _Rows(picked, self.origin // room, self.samples, self.samples, self.each * self.pieces, 1)


class _Images:
    """Images of a batch and of some groups, parted into interleaved lines.

    Attributes:
        groups: how many.
        lines: by the lines of rows and of columns; a row is one of all samples, each with zeros behind it, as many as a
            displacement can reach.
    """

    def __init__(self, batch: Centred, samples: slice, groups: slice, width: int, rows: Axis, cols: Axis) -> None:
        channels = slice(groups.start * width, groups.stop * width)
        x, centre = batch.values[samples, channels], batch.centre[channels].astype(np.float32)[:, None, None, None]
        x = (x if x.ndim == 4 else x[:, :, None]).transpose(1, 2, 0, 3)
        self.groups = len(x) // width
        above, beside = (max((abs(s.shift) for s in axis.sweeps), default=0) for axis in (rows, cols))
        count, height, room = x.shape[2], rows.length(0), cols.length(0) + beside
        pitch = count * room
        each = -(-height // max(1, round(height * pitch / DOT)))
        pieces = -(-height // each)
        tall, slack = 2 * above + each * pieces, -(-beside // pitch) * pitch
        self.lines: dict[tuple[int, int], _Rows] = {}
        for down, along in product(*({line for s in axis.sweeps for line in s.lines} for axis in (rows, cols))):
            part = x[:, down :: rows.stride, :, along :: cols.stride]
            flat = np.zeros((len(x), 2 * slack + tall * pitch), np.float32)
            image = flat[:, slack : slack + tall * pitch].reshape(len(x), tall, count, room)
            np.subtract(part, centre, out=image[:, above : above + part.shape[1], :, : part.shape[3]])
            values = flat.reshape(self.groups, width, -1)
            self.lines[down, along] = _Rows(values, slack + above * pitch, pitch, count, each, pieces)


def _turned(values: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.swapaxes(values, -1, -2)
