"""Columns of a layer's input at some positions of each sample, until there are enough of them to be multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Places
from bitwright.errors import InputError
from bitwright.graph import ConvAttrs, Op, OpKind, columns, groups_of
from bitwright.statistics._base import finite
from bitwright.statistics._positions import Picks, picks

WAITING = 128
"""Columns, or as many as a group has features, that are multiplied together: of fewer the products take less time than
adding K² of them up does."""
SUMMED = 256
"""Columns that are added up in single precision, before their sums are in double."""
SPATIAL = frozenset({OpKind.CONV, OpKind.CONV_TRANSPOSE})


class Waiting(NamedTuple):
    """What waits to be added up.

    Attributes:
        columns: of each input, (groups, K, rows).
        sums: of each input's columns, (groups, K).
        rows: of a tensor shaped like the output, (outputs, rows).
    """

    columns: tuple[NDArray[np.float32], ...]
    sums: tuple[NDArray[np.float64], ...]
    rows: NDArray[np.float32] | None


class Thinned:
    """Takes batches of a layer's input and hands over the columns that count.

    Columns are put where they wait as they come, and multiplied there: that memory is taken once, and not by every
    batch anew.

    Args:
        op: the layer.
        channel_axis: where the channels of its input lie.
        features: K of a column.
        thin: one position of a sample counts for every so many features.
        shape: (groups, K) that columns are handed over in, of an op's groups or parts of them.

    Attributes:
        passed_over: whether any position wasn't counted.
        samples: number of the next sample.
    """

    def __init__(self, op: Op, channel_axis: int | None, features: int, thin: int, shape: tuple[int, int]) -> None:
        self._op, self._axis, self._features, self._thin, self._shape = op, channel_axis, features, thin, shape
        self.samples = self._held = 0
        self._room: list[NDArray[np.float32]] = []
        """For each input, (groups, rows, K) or (groups, K, rows), see `_columns`."""
        taps = math.prod(op.attrs.kernel) if isinstance(op.attrs, ConvAttrs) else 1
        self._rows_apart = taps > 1 or op.kind is OpKind.LINEAR or channel_axis not in (None, 1)
        """Whether a column's features lie side by side, as they are found."""
        self._errors: list[NDArray[np.float32]] = []
        self.passed_over = False

    def take(self, inputs: Sequence[NDArray[Any]], error: NDArray[Any] | None) -> bool:
        """Take a batch of one or more inputs, and of a tensor shaped like the output.

        Returns:
            Whether so many columns wait that they should be handed over.

        Raises:
            InputError: a value isn't finite; nothing is taken then.
        """
        inputs = [np.asarray(x, np.float32) for x in inputs]
        chosen, _ = self._picks(inputs[0])
        if chosen is None:
            whole = [list(columns(self._op, x, self._axis)) for x in inputs]
            count = sum(part.shape[2] for part in whole[0])
            for out, parts in zip(self._waiting(len(inputs), count), whole, strict=True):
                end = 0
                for part in parts:
                    start, end = end, end + part.shape[2]
                    out[..., start:end] = part.reshape(*self._shape, -1)
        else:
            count = len(inputs[0]) * chosen.outputs.shape[1]
            self.passed_over = True
            for out, x in zip(self._waiting(len(inputs), count), inputs, strict=True):
                _, seen = self._picks(x)
                self._put(out, count, partial(chosen.columns, seen, self.samples), chosen.taps)
        others = [] if error is None else [self._errors_at(error, inputs[0])]
        # Bad data are bad, wherever they are looked at.
        return self._kept(count, others, [*inputs, *([] if error is None else [error])], len(inputs[0]))

    def take_picked(self, values: NDArray[Any], spatial: tuple[int, ...]) -> bool:
        """As `take`, of one input, of which a session has picked the `places`.

        Args:
            values: (samples, channels, positions).
            spatial: of the input.
        """
        chosen = self._chosen(spatial)
        assert chosen is not None
        self.passed_over = True
        values = np.asarray(values, np.float32)
        count = len(values) * chosen.outputs.shape[1]
        (out,) = self._waiting(1, count)
        self._put(out, count, partial(chosen.columns_of, values, self.samples), chosen.taps)
        return self._kept(count, [], [values], len(values))

    def places(self, spatial: tuple[int, ...]) -> Places | None:
        """What is read of an input; None where that is more than all of it."""
        chosen = self._chosen(spatial)
        if chosen is None or chosen.places.table.shape[1] > math.prod(spatial):
            return None
        return chosen.places

    def _waiting(self, inputs: int, count: int) -> list[NDArray[np.float32]]:
        """Where so many more columns of each input are to be put, (groups, K, rows)."""
        groups, features = self._shape
        end, axis = self._held + count, 1 if self._rows_apart else 2
        if not self._room or self._room[0].shape[axis] < end:
            # Batches of the same size, until they are enough, just find room.
            rows = max(end, -(-max(WAITING, features) // max(count, 1)) * count)
            shape = (groups, rows, features) if self._rows_apart else (groups, features, rows)
            held = [self._columns(room, 0, self._held) for room in self._room]
            self._room = [np.empty(shape, np.float32) for _ in range(inputs)]
            for room, old in zip(self._room, held, strict=False):
                self._columns(room, 0, self._held)[...] = old
        return [self._columns(room, self._held, end) for room in self._room]

    def _columns(self, room: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        """Some columns, (groups, K, rows), in whichever layout."""
        return room[:, start:stop].swapaxes(1, 2) if self._rows_apart else room[:, :, start:stop]

    def _put(self, out: NDArray[np.float32], count: int, put: Callable[[NDArray[np.float32]], None], taps: int) -> None:
        """Have columns put where they are wanted, or brought there where parts of features part a channel's taps."""
        if self._shape[1] % taps == 0:
            put(out)
            return
        found = np.empty((groups_of(self._op), self._features, count), np.float32)
        put(found)
        out[...] = found.reshape(*self._shape, count)

    def _kept(self, count: int, others: list[NDArray[np.float32]], whole: Sequence[NDArray[Any]], samples: int) -> bool:
        if not _all_finite([*whole, *others]):
            raise InputError(f"{self._op.id!r}: NaN or infinite values reach this layer; check the calibration data")
        self.samples += samples
        if count:
            self._held += count
            self._errors += others
        return self._held >= max(WAITING, self._shape[1])

    def handed_over(self) -> Waiting | None:
        """What waits, until the next batch is put in its place; None where nothing does."""
        held, errors = self._held, self._errors
        self._held, self._errors = 0, []
        if not held:
            return None
        found = tuple(self._columns(room, 0, held) for room in self._room)
        return Waiting(found, tuple(map(_sum, found)), np.concatenate(errors, axis=1) if errors else None)

    def let_go(self) -> None:
        """Hold no room for columns until some come again."""
        assert not self._held
        self._room = []

    def _picks(self, x: NDArray[Any]) -> tuple[Picks | None, NDArray[Any]]:
        """What counts of a batch, and the batch as (samples, channels, *spatial)."""
        default = -1 if self._op.kind is OpKind.LINEAR else 1
        seen = np.moveaxis(x, default if self._axis is None else self._axis, 1)
        rank = len(self._op.attrs.kernel) if isinstance(self._op.attrs, ConvAttrs) else seen.ndim - 2
        if seen.ndim != rank + 2:
            return None, seen  # which `columns` refuses
        return self._chosen(seen.shape[2:]), seen

    def _chosen(self, spatial: tuple[int, ...]) -> Picks | None:
        return picks(self._op, spatial, self._features, self._thin)

    def _errors_at(self, error: NDArray[Any], x: NDArray[Any]) -> NDArray[np.float32]:
        chosen, _ = self._picks(x)
        if chosen is None:
            return rows_of(self._op, error, self._axis)
        return chosen.rows(
            np.moveaxis(np.asarray(error, np.float32), _outputs_on(self._op, self._axis), 1), self.samples
        )


def _sum(columns: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of columns (groups, K, rows), (groups, K): no more than some in single precision at a time."""
    rows = columns.shape[2]
    parts = (columns[:, :, i : i + SUMMED] for i in range(0, rows, SUMMED))
    with np.errstate(over="ignore", invalid="ignore"):  # infinite moments, as squares that overflow are
        return np.asarray(sum((part @ np.ones(part.shape[2], np.float32)).astype(np.float64) for part in parts))


def _all_finite(values: Sequence[NDArray[Any]]) -> bool:
    """Whether all values are; one that isn't shows in their sum, where finite ones may overflow too."""
    with np.errstate(over="ignore", invalid="ignore"):
        return finite([np.sum(v) for v in values]) or finite(values)


def rows_of(op: Op, values: NDArray[Any], channel_axis: int | None) -> NDArray[np.float32]:
    """A tensor shaped like the op's output → (output channels, rows), rows ordered as in `columns`."""
    axis = _outputs_on(op, channel_axis)
    return np.moveaxis(np.asarray(values, np.float32), axis, 0).reshape(values.shape[axis], -1)


def _outputs_on(op: Op, channel_axis: int | None) -> int:
    if channel_axis is not None:
        return channel_axis
    return 1 if op.kind in SPATIAL else -1
