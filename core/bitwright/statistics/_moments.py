"""First and second moments of a linear op's input columns: all that layer-wise reconstruction needs of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Reduction
from bitwright.errors import InputError
from bitwright.graph import ConvAttrs, Op, OpKind, columns, groups_of
from bitwright.statistics._base import finite
from bitwright.statistics._displacement import Centred, centred_products, column_sums
from bitwright.statistics._thinned import Thinned, rows_of

Moments = NDArray[np.float64]
RESIDUAL = ("rx", "rq", "sum_r", "sum_rr")
STEADY = 4.0
"""Mean squared over variance from which a feature is summed about its mean: float32 products lose too much there."""
SCARCE = 4
"""Columns for each feature below which moments that leave positions out are told to be thin."""
CHUNK = 2**14
"""Positions of a sample that are squared at a time."""
NARROW = 4
"""Channels of a group up to which a convolution is summed by displacement; columns of wider ones are as fast."""


class LayerMoments:
    """Moments of the columns x (float network) and x̂ (quantized network) of one linear op (see `linear_form`).

    With weights W, candidate Ŵ and bias change handled apart, the mean squared output error of a layer is
    ``tr(Ŵ Ĥ Ŵᵀ) − 2 tr(Ŵ Cᵀ Wᵀ) + tr(W H Wᵀ)``, with gradient ``2 (Ŵ Ĥ − W C)`` (AdaRound, Nagel et al. 2020,
    eq. 20 written in moments). Sums are kept in float64, batches are multiplied in float32; those of convolutions with
    few channels a group, as depthwise ones, by displacement (`_displacement`), without writing columns.

    Features that barely vary around a large mean are summed about a shift near it (chosen on the first batch), so that
    their variance isn't the difference of two large numbers; every property gives the moments of x itself. Where x̂ = x,
    second moments are given as single precision has their sums (`_rounded`), which is how banks keep them.

    Args:
        op: the op, for its geometry.
        features: K, the length of a column.
        channel_axis: where the channels of the input lie.
        paired: whether updates bring x and x̂; otherwise x̂ = x and one matrix is held in place of three.
        products: whether second moments are wanted; means alone cost a fraction of the time and memory.
        residual_outputs: output channels of an op whose output is one operand of a sum: updates then also bring the
            error r of the other operand (float minus quantized, shaped like the output), which the layer can make up
            for. 0 for none. Needs an op without groups.
        blocks: equal parts of the features whose second moments with one another are left out, which takes as many
            times less memory: everything has (groups · blocks, K / blocks) in place of (groups, K).
        thin: of each sample, count one position for every so many features, 4 at least, spread evenly (`_positions`),
            in place of all positions. None counts all.
        spatial: of the input, where it is known ahead and the same for all samples: `places` then says which of it is
            enough. Needs an input that isn't paired.

    Attributes:
        places: of a sample of the input, all that is counted of it; None for the whole. Updates may bring these values
            by `update_picked`, channels lying on `place_axis`.

    Raises:
        InputError: the features can't be parted so, or `thin` isn't a number of features.
    """

    reduction: Reduction = "none"
    axis: int | None = None

    def __init__(
        self,
        op: Op,
        features: int,
        channel_axis: int | None = None,
        *,
        paired: bool = True,
        products: bool = True,
        residual_outputs: int = 0,
        blocks: int = 1,
        thin: int | None = None,
        spatial: tuple[int, ...] | None = None,
    ) -> None:
        if thin is not None and thin < 1:
            raise InputError(f"{op.id!r}: thin={thin}; one position is counted for every 1, 2, … features")
        if features % blocks or (blocks > 1 and residual_outputs):
            raise InputError(f"{op.id!r}: {features} features with a residual operand, or in {blocks} unequal blocks")
        groups, features = groups_of(op) * blocks, features // blocks
        # Features of a linear op lie last, whichever axis the network's channels are on.
        self.op, self.channel_axis = op, None if op.kind is OpKind.LINEAR else channel_axis
        self.paired, self.blocks = paired, blocks
        self.thin, self._columns = thin, features * blocks
        self._count = 0
        self._some = None if thin is None else Thinned(op, self.channel_axis, self._columns, thin, (groups, features))
        self._spatial = () if spatial is None else spatial
        self.places = None if self._some is None or spatial is None or paired else self._some.places(spatial)
        self._sum: list[Moments] = [np.zeros((groups, features)) for _ in range(1 + paired)]
        """Of x − shift."""
        self._shift: list[Moments] = [np.zeros((groups, features)) for _ in range(1 + paired)]
        self._products: list[NDArray[Any]] = [
            np.zeros((groups, features, features)) for _ in range((3 if paired else 1) * products)
        ]
        self._settled = False

        shapes = [(residual_outputs, features)] * 2 + [(residual_outputs,)] * 2 if residual_outputs else []
        self._residual: list[Moments] = [np.zeros(shape) for shape in shapes]

    @staticmethod
    def bytes_for(op: Op, features: int, *, paired: bool = True, products: bool = True, blocks: int = 1) -> int:
        """Memory that the finished statistic holds."""
        each = (3 if paired else 1) * products * (features // blocks) + 2 * (1 + paired)
        return 8 * groups_of(op) * features * each

    def update(self, *values: NDArray[Any]) -> None:
        """Take the op's input of one batch: (x, x̂), or (x,) when not paired.

        Squares that overflow single precision are infinite moments, on which no layer can be solved.

        Raises:
            InputError: the inputs differ in shape, hold NaN or infinity, or don't fit the op; nothing is taken then.
        """
        assert not self._settled
        with np.errstate(over="ignore", invalid="ignore"):
            self._take(values)

    def update_picked(self, values: NDArray[Any]) -> None:
        """Take of one batch what `places` asks for, (samples, channels, positions): the same as of the whole input.

        Raises:
            InputError: a value isn't finite; nothing is taken then. What isn't picked goes unseen.
        """
        assert self.places is not None
        assert self._some is not None
        with np.errstate(over="ignore", invalid="ignore"):
            if self._some.take_picked(values, self._spatial):
                self._add_waiting()

    @property
    def place_axis(self) -> int:
        """Where the channels of the input lie that `places` is of."""
        return (-1 if self.op.kind is OpKind.LINEAR else 1) if self.channel_axis is None else self.channel_axis

    @property
    def next_sample(self) -> int:
        """Number of the sample that comes next."""
        return 0 if self._some is None else self._some.samples

    def _take(self, values: tuple[NDArray[Any], ...]) -> None:
        expected = 1 + self.paired + self.has_residual
        if len(values) != expected:
            raise InputError(f"{self.op.id!r}: expected {expected} tensors, got {len(values)}")
        if self.paired and values[0].shape != values[1].shape:
            raise InputError(f"{self.op.id!r}: float input {values[0].shape}, quantized input {values[1].shape}")
        if self._some is not None and values[0].ndim > 1:
            if self._some.take(values[: 1 + self.paired], values[-1] if self.has_residual else None):
                self._add_waiting()
            return
        sums = [self._over_samples(v) for v in values]
        error = rows_of(self.op, values[-1], self.channel_axis) if self.has_residual else None
        values, sums = values[: 1 + self.paired], sums[: 1 + self.paired]
        means = [self._over_positions(total) for total in sums]
        count = means[0][1] * (1 if values[0].ndim == 1 else len(values[0]))
        if count == 0:
            return
        totals = [total for total, _ in means]
        if self._products and self._count == 0:
            self._shift = [self._steady(v, s, count) for v, s in zip(values, sums, strict=True)]
        for own, total, shift in zip(self._sum, totals, self._shift, strict=True):
            own += total - count * shift
        if self._products and self._narrow:
            self._add_by_displacement(values, sums)
        elif self._products:
            self._add_by_columns(values, error)
        self._count += count

    def _add_by_columns(self, values: Sequence[NDArray[Any]], error: NDArray[np.float32] | None) -> None:
        for chunks in zip(*(columns(self.op, v, self.channel_axis) for v in values), strict=True):
            part, error = (None, None) if error is None else np.split(error, [chunks[0].shape[2]], axis=1)
            some = tuple(c.reshape(*self._sum[0].shape, c.shape[2]) for c in chunks)
            if any(shift.any() for shift in self._shift):  # not in place: columns may be the batch itself
                some = tuple(c - s[..., None].astype(np.float32) for c, s in zip(some, self._shift, strict=True))
            self._add_chunks(some, part)

    def _add_chunks(self, chunks: tuple[NDArray[np.float32], ...], part: NDArray[np.float32] | None) -> None:
        """Add the products of columns (groups, K, rows) less the shift, and of the residual operand's rows."""
        x, q = chunks[0], chunks[-1]
        if part is not None:
            sums = part @ x[0].T, part @ q[0].T, part.sum(1, np.float64), np.square(part).sum(1, np.float64)
            for total, addend in zip(self._residual, sums, strict=True):
                total += addend
        for total, (a, b) in zip(self._products, self._pairs, strict=True):
            # numpy turns a @ a.T into a symmetric rank-k update, half the work of a general product.
            total += chunks[a] @ np.swapaxes(chunks[b], 1, 2)

    def _flush(self) -> None:
        """Put columns that wait into the sums, where more may not come soon."""
        self._add_waiting()
        if self._some is not None:
            self._some.let_go()

    def _add_waiting(self) -> None:
        """Put columns that wait into the sums."""
        waiting = None if self._some is None else self._some.handed_over()
        if waiting is None:
            return
        chunks, totals, error = waiting
        count = chunks[0].shape[2]
        with np.errstate(over="ignore", invalid="ignore"):
            if self._products and self._count == 0:
                squares = (np.einsum("gkr,gkr->gk", c, c).astype(np.float64) for c in chunks)
                self._shift = [_shift_of(t / count, q / count) for t, q in zip(totals, squares, strict=True)]
            for own, total, shift in zip(self._sum, totals, self._shift, strict=True):
                own += total - count * shift
            if self._products:
                for chunk, shift in zip(chunks, self._shift, strict=True):
                    _take_out(shift, chunk)
                self._add_chunks(chunks, error)
        self._count += count

    def begin_at(self, sample: int) -> None:
        """What comes first is this sample of the data: which positions are counted depends on its number."""
        if self._some is not None:
            self._some.samples = sample

    @property
    def count(self) -> int:
        """Columns that were seen."""
        self._flush()
        return self._count

    @property
    def per_feature(self) -> float:
        """Columns that were seen for each of their features."""
        return self.count / self._columns

    @property
    def scarce(self) -> bool:
        """Whether positions weren't counted though fewer columns came than `SCARCE` for each feature."""
        return self._some is not None and self._some.passed_over and self.per_feature < SCARCE

    def _add_by_displacement(self, values: Sequence[NDArray[Any]], sums: Sequence[NDArray[np.float64]]) -> None:
        attrs = self.op.attrs
        assert isinstance(attrs, ConvAttrs)
        inputs = [
            Centred(
                np.asarray(self._channels_first(v), np.float32),
                self._channels_first(s)[0],
                shift[:, :: self._taps].reshape(-1),
            )
            for v, s, shift in zip(values, sums, self._shift, strict=True)
        ]
        for total, (a, b) in zip(self._products, self._pairs, strict=True):
            total += centred_products(attrs, inputs[a], inputs[b])

    def _steady(self, values: NDArray[Any], sums: NDArray[np.float64], count: int) -> Moments:
        """Of a batch: the means of the features that barely vary around them, as float32; 0 for the others.

        By displacement, they are those of channels: what padding takes part in varies otherwise, and is told apart.
        """
        squares = _squares(values[None] if values.ndim == 1 else values)
        if not self._narrow:
            mean, square = (self._over_positions(total)[0] / count for total in (sums, squares))
        else:
            size = values.size / len(self._sum[0]) / (self._sum[0].shape[1] // self._taps)
            spatial = tuple(range(2, values.ndim))
            mean, square = (
                (self._channels_first(t).sum(axis=spatial) / size).reshape(len(self._sum[0]), -1).repeat(self._taps, 1)
                for t in (sums, squares)
            )
        return _shift_of(mean, square)

    def _channels_first(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.moveaxis(values, 1 if self.channel_axis is None else self.channel_axis, 1)

    @property
    def _taps(self) -> int:
        return int(np.prod(self.op.attrs.kernel)) if isinstance(self.op.attrs, ConvAttrs) else 1

    @property
    def _narrow(self) -> bool:
        """Whether products are summed by displacement; a residual operand needs columns."""
        attrs = self.op.attrs
        if self.op.kind is not OpKind.CONV or not isinstance(attrs, ConvAttrs) or len(attrs.kernel) > 2:
            return False
        plain = self.blocks == 1 and not self._residual
        return plain and self._taps > 1 and self._sum[0].shape[1] <= NARROW * self._taps

    def _over_samples(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """The sum of a batch's samples, as a batch of one.

        Raises:
            InputError: a value isn't finite.
        """
        total: Moments = (values[None] if values.ndim == 1 else values).sum(axis=0, keepdims=True, dtype=np.float64)
        if not finite([total]):  # a value that isn't shows in the sum
            raise InputError(f"{self.op.id!r}: NaN or infinite values reach this layer; check the calibration data")
        return total

    def _over_positions(self, samples: NDArray[np.float64]) -> tuple[Moments, int]:
        """Of the sum of samples, the sum of its columns and how many a sample has: columns are linear in the input."""
        attrs = self.op.attrs
        if self.op.kind is OpKind.CONV and isinstance(attrs, ConvAttrs) and samples.ndim == len(attrs.kernel) + 2:
            total, rows = column_sums(attrs, self._channels_first(samples)[0])
            return total.reshape(self._sum[0].shape), rows
        total, rows = np.zeros(self._sum[0].shape), 0
        high = samples.astype(np.float32)  # columns are of single precision: two of them hold all digits
        for part, rest in zip(*(columns(self.op, v, self.channel_axis) for v in (high, samples - high)), strict=True):
            both = part.sum(axis=2, dtype=np.float64) + rest.sum(axis=2, dtype=np.float64)
            total += both.reshape(total.shape)
            rows += part.shape[2]
        return total, rows

    def merge(self, other: Self) -> None:
        """Add what another instance has seen."""
        assert not self._settled
        if self.thin != other.thin:
            raise InputError(f"{self.op.id!r}: moments of other positions, thin={self.thin} and thin={other.thin}")
        other._flush()
        if self.count == 0:
            self._shift = [shift.copy() for shift in other._shift]
        self._count += other._count
        if self._some is not None and other._some is not None:
            self._some.passed_over |= other._some.passed_over
        moved = other._about(self._shift)
        for mine, theirs in zip(self._all, moved, strict=True):
            mine += theirs

    def _about(self, shifts: list[Moments]) -> list[Moments]:
        """All sums as they would be about other shifts."""
        steps = [own - shift for own, shift in zip(self._shift, shifts, strict=True)]
        if not any(step.any() for step in steps):
            return self._all
        sums = [total + self._count * step for total, step in zip(self._sum, steps, strict=True)]
        products = [
            total
            + _outer(self._sum[a], steps[b])
            + _outer(steps[a], self._sum[b])
            + self._count * _outer(steps[a], steps[b])
            for total, (a, b) in zip(self._products, self._pairs, strict=True)
        ]
        residual = list(self._residual)
        if residual:
            residual[0] = residual[0] + np.outer(residual[2], steps[0][0])
            residual[1] = residual[1] + np.outer(residual[2], steps[-1][0])
        return sums + products + residual

    @property
    def _pairs(self) -> tuple[tuple[int, int], ...]:
        """Which of x and x̂ each product is of."""
        last = len(self._sum) - 1
        return ((0, 0), (last, last), (0, last))[: len(self._products)]

    def settle(self) -> None:
        """Nothing more is added: second moments that are given in single precision anyway are held in it."""
        self._flush()
        self._products = [self._rounded(i) for i in range(len(self._products))]
        self._settled = True

    def state(self) -> dict[str, NDArray[Any]]:
        """Plain arrays."""
        self._flush()
        names = ("sum_x", "sum_q")[: len(self._sum)], ("xx", "qq", "xq")[: len(self._products)]
        return {
            "count": np.array(self._count),
            **({} if self._some is None else {"passed_over": np.array(self._some.passed_over)}),
            **dict(zip(names[0], self._sum, strict=True)),
            **dict(zip(("shift_x", "shift_q"), self._shift, strict=False)),
            **dict(zip(names[1], self._products, strict=True)),
            **dict(zip(RESIDUAL, self._residual, strict=False)),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take a saved state."""
        self._count = int(state["count"])
        if self._some is not None:
            self._some.handed_over()
            self._some.let_go()
            self._some.passed_over = bool(state.get("passed_over", False))
        self._sum = [np.array(state[n]) for n in ("sum_x", "sum_q")[: len(self._sum)]]
        self._shift = [np.array(state[n]) for n in ("shift_x", "shift_q")[: len(self._sum)]]
        self._products = [np.array(state[n]) for n in ("xx", "qq", "xq")[: len(self._products)]]
        self._residual = [np.array(state[n]) for n in RESIDUAL[: len(self._residual)]]

    @property
    def _all(self) -> list[Moments]:
        return self._sum + self._products + self._residual

    @property
    def has_residual(self) -> bool:
        """Whether the error of a sum's other operand is known."""
        return bool(self._residual)

    @property
    def residual(self) -> tuple[Moments, Moments, Moments, Moments]:
        """E[r xᵀ], E[r x̂ᵀ] (outputs, K), E[r], E[r²] (outputs,) of the other operand's error r (`residual_outputs`).

        Raises:
            InputError: it wasn't collected.
        """
        if not self._residual:
            raise InputError(f"{self.op.id!r}: no residual operand was observed")
        self._flush()
        rx, rq, mean, square = (self._scaled(total) for total in self._residual)
        return rx + np.outer(mean, self._shift[0][0]), rq + np.outer(mean, self._shift[-1][0]), mean, square

    def centred_residual(self) -> tuple[Moments, Moments, Moments]:
        """`residual`'s E[r xᵀ], E[r x̂ᵀ] and E[r²] with all means taken out.

        Raises:
            InputError: it wasn't collected.
        """
        if not self._residual:
            raise InputError(f"{self.op.id!r}: no residual operand was observed")
        self._flush()
        rx, rq, mean, square = (self._scaled(total) for total in self._residual)
        x, q = self._scaled(self._sum[0])[0], self._scaled(self._sum[-1])[0]
        return rx - np.outer(mean, x), rq - np.outer(mean, q), square - np.square(mean)

    @property
    def has_products(self) -> bool:
        """Whether second moments were collected."""
        return bool(self._products)

    def _centred(self, index: int) -> Moments:
        if not self._products:
            raise InputError(f"{self.op.id!r}: only means were collected (products=False)")
        self._flush()
        a, b = (self._scaled(self._sum[i]) for i in self._pairs[index])
        total = self._scaled(self._rounded(index))
        for group, rows in enumerate(total):
            for row, factor in zip(rows, a[group], strict=True):
                row -= factor * b[group]
        return total

    def _product(self, index: int) -> Moments:
        """About zero: what the shift has taken out put in again."""
        if not self._products:
            raise InputError(f"{self.op.id!r}: only means were collected (products=False)")
        self._flush()
        total = self._scaled(self._rounded(index))
        (a, b), shifts = self._pairs[index], self._shift
        if not (shifts[a].any() or shifts[b].any()):
            return total
        m, n = self._scaled(self._sum[a]), self._scaled(self._sum[b])
        for left, right in ((shifts[a], n), (m, shifts[b]), (shifts[a], shifts[b])):
            total += _outer(left, right)
        return total

    def _rounded(self, index: int) -> NDArray[np.floating[Any]]:
        """Second moments in single precision where x̂ = x, so that in files of half the size they are the same.

        Products were summed in it over a batch: the digits behind it are none of the data's. What overflows it stays.
        """
        total = self._products[index]
        if self.paired or self._settled:
            return total
        with np.errstate(over="ignore"):
            single = total.astype(np.float32)
        if not np.isfinite(single).all():
            return total
        # A file has the upper triangle. In place: of a wide layer each copy takes as much as a part of the network.
        for row in range(single.shape[1]):
            single[:, row + 1 :, row] = single[:, row, row + 1 :]
        single += 0  # no −0
        return single

    def _scaled(self, total: NDArray[np.floating[Any]]) -> Moments:
        if self._count == 0:
            raise InputError(f"{self.op.id!r}: no calibration data reached this layer")
        return np.asarray(np.divide(total, self.count, dtype=np.float64))

    def second(self, which: Literal["xx", "qq", "xq"], *, centred: bool) -> Moments:
        """H, Ĥ or C (groups, K, K), a new array at each call; `centred` with the means taken out."""
        index = ("xx", "qq", "xq").index(which) if self.paired else 0
        return self._centred(index) if centred else self._product(index)

    @property
    def mean(self) -> Moments:
        """E[x], (groups, K)."""
        self._flush()
        return self._shift[0] + self._scaled(self._sum[0])

    @property
    def mean_quantized(self) -> Moments:
        """E[x̂], (groups, K)."""
        self._flush()
        return self._shift[-1] + self._scaled(self._sum[-1])

    @property
    def xx(self) -> Moments:
        """H = E[x xᵀ], (groups, K, K)."""
        return self.second("xx", centred=False)

    @property
    def qq(self) -> Moments:
        """Ĥ = E[x̂ x̂ᵀ], (groups, K, K)."""
        return self.second("qq", centred=False)

    @property
    def xq(self) -> Moments:
        """C = E[x x̂ᵀ], (groups, K, K)."""
        return self.second("xq", centred=False)

    def centred(self) -> tuple[Moments, Moments, Moments]:
        """(H, Ĥ, C) with the means taken out: the error that is left once the bias absorbs the mean difference."""
        if not self.paired:
            return (self._centred(0),) * 3
        return self._centred(0), self._centred(1), self._centred(2)


def _shift_of(mean: Moments, square: Moments) -> Moments:
    """The means of features that barely vary around them, as float32; 0 for the others."""
    steady: Moments = np.where(np.square(mean) > STEADY * (square - np.square(mean)), mean, 0.0)
    return steady.astype(np.float32).astype(np.float64)


def _take_out(shift: Moments, columns: NDArray[np.float32]) -> None:
    """Take a shift (groups, K) out of columns (groups, K, rows), in place: as a rule few features have one."""
    some = np.nonzero(shift)
    if 4 * len(some[0]) < shift.size:
        columns[some] -= shift[some].astype(np.float32)[:, None]
    else:
        columns -= shift[..., None].astype(np.float32)


def _outer(a: Moments, b: Moments) -> Moments:
    return a[:, :, None] * b[:, None, :]


def _squares(values: NDArray[Any]) -> Moments:
    """The sum of samples' squares, as a batch of one; some at a time, since all in float64 are twice the batch."""
    flat = values.reshape(len(values), -1)
    total = np.empty((1, flat.shape[1]))
    for start in range(0, flat.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        total[0, part] = np.square(flat[:, part], dtype=np.float64).sum(axis=0)
    return total.reshape(1, *values.shape[1:])
