"""Which positions of a sample a layer's moments count when they count some, and the columns at these alone.

Neighbouring positions of an image read nearly the same, so that a layer with few features and a large image sees far
more columns than its moments need. The positions are put in an order in which neighbours stay together (the bits of
their coordinates interleaved: Morton 1966), which is cut into as many runs of equal length as are wanted, with one
position of each. Where in its run moves on from sample to sample and from run to run by steps that no number of them
repeats (a Kronecker sequence), so that rows, columns, borders and strides are met about as often as they occur. After
`TURNS` samples the same positions come again. Nothing is drawn at random, and nothing depends on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Places
from bitwright.graph import ConvAttrs, Op, OpKind, as_convolution, output_spatial

TURNS = 16
"""Samples after which the same positions come again."""
FEWEST = 4
"""Positions of a sample that are counted in any case: of a depthwise layer's few features too, beside the border."""
GOLDEN, SILVER = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1


def wanted(features: int, thin: int) -> int:
    """Positions of a sample that a layer with so many features counts: one for each `thin` of them."""
    return max(FEWEST, -(-features // thin))


@dataclass(frozen=True)
class Picks:
    """The positions that are counted, and what the taps of a column read there.

    Attributes:
        outputs: (TURNS, positions), counted through the op's output, row after row.
        inputs: (TURNS, positions, taps), counted through the input likewise.
        inside: 1 where there is an input, likewise, and 0 where not; None where there always is.
        places: all of an input that is read at these positions, position by position.
    """

    outputs: NDArray[np.intp]
    inputs: NDArray[np.intp]
    inside: NDArray[np.float32] | None
    places: Places

    @property
    def taps(self) -> int:
        """Values of a channel that a column has."""
        return int(self.inputs.shape[2])

    def columns(self, x: NDArray[np.float32], first: int, out: NDArray[np.float32]) -> None:
        """Put the columns of a batch at these positions where they are wanted.

        Args:
            x: (samples, channels, *spatial), in whichever layout in memory.
            first: number of the first sample.
            out: (groups, channels of a group · taps, samples · positions), likewise.
        """
        samples, channels = x.shape[:2]
        wanted = self._by_sample(out, samples)
        last = x.strides[1] == x.itemsize  # channels lie side by side: all of them are taken at once
        flat = np.moveaxis(x, 1, -1).reshape(samples, -1, channels) if last else x.reshape(samples, channels, -1)
        for sample, place in enumerate(wanted):
            turn = (first + sample) % len(self.inputs)
            places = self.inputs[turn].reshape(-1)
            if last:
                picked = flat[sample].take(places, axis=0, mode="clip").T
            else:
                picked = flat[sample].take(places, axis=1, mode="clip")
            inside = None if self.inside is None else self.inside[turn]
            _put(picked.reshape(place.shape), inside, place)

    def columns_of(self, values: NDArray[np.float32], first: int, out: NDArray[np.float32]) -> None:
        """As `columns`, of what was picked of a batch.

        Args:
            values: of `places`, (samples, channels, positions · taps).
            first: number of the first sample.
            out: as for `columns`.
        """
        wanted = self._by_sample(out, len(values))
        turns = (first + np.arange(len(values))) % len(self.inputs)
        inside = None if self.inside is None else self.inside[turns][:, None, None]
        _put(values.reshape(wanted.shape), inside, wanted)

    def _by_sample(self, out: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
        """A view of where columns are wanted, (samples, groups, channels, positions, taps): axes are only parted."""
        groups, features, _ = out.shape
        parted = out.reshape(groups, features // self.taps, self.taps, samples, self.inputs.shape[1])
        return parted.transpose(3, 0, 1, 4, 2)

    def rows(self, y: NDArray[np.float32], first: int) -> NDArray[np.float32]:
        """Of a tensor shaped like the op's output, (samples, channels, *spatial), the same rows: (channels, rows)."""
        flat = y.reshape(*y.shape[:2], -1)
        turns = self.outputs[(first + np.arange(len(flat))) % len(self.outputs)]
        return np.concatenate([sample[:, places] for sample, places in zip(flat, turns, strict=True)], axis=1)


def picks(op: Op, spatial: tuple[int, ...], features: int, thin: int) -> Picks | None:
    """What is counted of an op's input with this spatial shape; None for every position.

    Args:
        op: a convolution, transposed convolution or linear op, whose input then is (samples, features, rows).
        spatial: of the input.
        features: K of a column.
        thin: see `wanted`.
    """
    attrs = op.attrs if isinstance(op.attrs, ConvAttrs) else None
    if op.kind is OpKind.LINEAR:
        attrs = None
    return _picks(attrs, op.kind is OpKind.CONV_TRANSPOSE, spatial, wanted(features, thin))


@lru_cache(maxsize=256)
def _picks(attrs: ConvAttrs | None, transposed: bool, spatial: tuple[int, ...], count: int) -> Picks | None:
    of = attrs, transposed, spatial, count
    if attrs is None:
        outputs = spread(spatial, count)
        return None if outputs is None else Picks(outputs, outputs[..., None], None, Places(of, outputs))
    steps = attrs.strides if transposed else (1,) * len(spatial)
    if transposed:
        attrs = as_convolution(attrs)
    shape = output_spatial(spatial, attrs, dilate=steps if transposed else None)
    outputs = spread(shape, count)
    if outputs is None:
        return None
    place = np.unravel_index(outputs, shape)
    taps = np.unravel_index(np.arange(math.prod(attrs.kernel)), attrs.kernel)
    inputs = np.zeros((*outputs.shape, len(taps[0])), np.intp)
    inside = np.ones(inputs.shape, bool)
    for at, tap, size, step, stride, dilation, (before, _) in zip(
        place, taps, spatial, steps, attrs.strides, attrs.dilations, attrs.pads, strict=True
    ):
        # Among the inputs with zeros between them, of which each `step`-th one is an input.
        where, gap = np.divmod(at[..., None] * stride + tap * dilation - before, step)
        inside &= (gap == 0) & (where >= 0) & (where < size)
        inputs = inputs * size + where.clip(0, size - 1)
    places = Places(of, inputs.reshape(len(inputs), -1))
    return Picks(outputs, inputs, None if inside.all() else inside.astype(np.float32), places)


def _put(values: NDArray[np.float32], inside: NDArray[np.float32] | None, out: NDArray[np.float32]) -> None:
    """Values where there is an input, and 0 where not."""
    if inside is None:
        out[...] = values
    else:
        np.multiply(values, inside, out=out)


@lru_cache(maxsize=256)
def spread(shape: tuple[int, ...], count: int) -> NDArray[np.intp] | None:
    """For each turn, `count` different places of an array of this shape, as flat indices.

    None for all of them: also where that is less than twice as many, since runs of one place and of two would count
    some places twice as often as others.
    """
    total = math.prod(shape)
    if 2 * count > total:
        return None
    edges = np.arange(count + 1) * total // count
    turns, runs = np.arange(TURNS)[:, None], np.arange(count)
    within = np.modf(0.5 + turns * GOLDEN + runs * SILVER)[0]
    return np.asarray(_neighbours(shape)[edges[:-1] + (within * np.diff(edges)).astype(np.intp)])


def _neighbours(shape: tuple[int, ...]) -> NDArray[np.intp]:
    """All places of an array, as flat indices, in an order that stays in one neighbourhood after the other."""
    places = np.indices(shape).reshape(len(shape), -1)
    key = np.zeros(places.shape[1], np.int64)
    for bit in range(max(shape).bit_length()):
        for axis, at in enumerate(reversed(places)):
            key |= (at >> bit & 1) << (bit * len(shape) + axis)
    return np.argsort(key, kind="stable")
