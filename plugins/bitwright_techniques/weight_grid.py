"""A weight's grid in matrix form, so that solvers needn't know layouts and granularities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import EncodingError
from bitwright.graph import Op, from_matrix, join_columns, split_columns, to_matrix
from bitwright.grids import CODE_TABLES, Blockwise, Encoding, cast_float, largest_of, spread
from bitwright_techniques.rounding_descent import clipped

Matrix = NDArray[np.float32]
"""(groups, rows, K), as `linear_form.to_matrix` gives it; rows = output channels of a group."""


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """The grid points a weight matrix may take: ``ŵ = c · scale`` with integer c, ``qmin − z ≤ c ≤ qmax − z``.

    Codes here are counted from the zero point (c = q − z), which makes symmetric and asymmetric grids alike. Those of
    blocks of floats are the format's own values (`of` with `floats`), which have no neighbours at ±1.
    A *tie* is a set of rows that must be scaled together: one row per channel or blockwise, all rows per tensor.

    Attributes:
        op, shape: the op and its weight's canonical shape.
        encoding: gives bits, signedness, granularity and zero points; its own scale is replaced by `scale`.
        cells: (groups, rows, 1 or K), index into `scale`; 1 where a row has a single scale.
        scale: float32, the encoding's scale array, flattened.
        multiples: LPBQ's integer block scales, flattened; None otherwise.
        floor: scales that may not be undercut (`Encoding.pair_limit`), flattened; None where there is no limit.
        blocks: parts that columns are in (`split_columns`), each a group of its own; rows of one channel are tied.
        starts: features from which on, up to the next of them, all `cells` are the same.
    """

    op: Op
    shape: tuple[int, ...]
    encoding: Encoding
    cells: NDArray[np.intp]
    scale: NDArray[np.float32]
    multiples: NDArray[np.int32] | None = None
    floor: NDArray[np.float32] | None = None
    blocks: int = 1
    starts: NDArray[np.intp] = field(default_factory=lambda: np.zeros(1, np.intp))

    @classmethod
    def of(
        cls, op: Op, shape: tuple[int, ...], encoding: Encoding, blocks: int = 1, *, floats: bool = False
    ) -> WeightGrid:
        """The grid of a weight of `shape` under an integer encoding, whose columns are in `blocks`.

        Args:
            op, shape, encoding, blocks: of the weight.
            floats: values of a scaled float format, or of a table, are taken too; for those who round by `snap`.

        Raises:
            EncodingError: the encoding is a float format.
        """
        if encoding.float_format is not None and not (floats and is_block_of_floats(encoding)):
            raise EncodingError(f"{op.id!r}: a {encoding.float_format} weight has no rounding to choose")
        index = np.arange(encoding.scale.size).reshape(encoding.scale.shape)
        cells = to_matrix(op, np.broadcast_to(spread(index, shape, encoding.granularity), shape))
        cells = split_columns(cells, blocks)
        if (cells == cells[..., :1]).all():
            cells = cells[..., :1]
        multiples = None if encoding.block_scale is None else encoding.block_scale.reshape(-1)
        scale = encoding.scale.reshape(-1)
        floor = None if encoding.pair_limit is None else scale
        starts = np.flatnonzero(np.r_[True, (cells[..., 1:] != cells[..., :-1]).any(axis=(0, 1))])
        return cls(op, shape, encoding, np.ascontiguousarray(cells, np.intp), scale, multiples, floor, blocks, starts)

    @property
    def whole_rows(self) -> bool:
        """Whether each row has a single scale (per tensor, per output channel)."""
        return bool(self.cells.shape[2] == 1)

    @cached_property
    def ties(self) -> NDArray[np.intp]:
        """(groups, rows): number of the tie that a row belongs to."""
        groups, rows, _ = self.cells.shape
        if self.whole_rows:
            return np.unique(self.cells[..., 0], return_inverse=True)[1].reshape(groups, rows)
        if self.blocks > 1 and self.multiples is not None:
            # Blocks of a channel have one float scale in common, whichever part of the columns they lie in.
            channels = np.arange(groups // self.blocks * rows).reshape(-1, 1, rows)
            return np.repeat(channels, self.blocks, axis=1).reshape(groups, rows)
        rows_alone = np.arange(groups * rows).reshape(groups, rows)
        cells, owner = self.cells[..., self.starts], np.empty(self.scale.size, np.intp)
        owner[cells] = rows_alone[..., None]
        return rows_alone if (owner[cells] == rows_alone[..., None]).all() else np.zeros((groups, rows), np.intp)

    @cached_property
    def alone(self) -> bool:
        """Whether each scale is of one row, or of one run of features in it."""
        return int(np.bincount(self.cells[..., self.starts].reshape(-1)).max()) == 1

    @cached_property
    def tie_of_cell(self) -> NDArray[np.intp]:
        """(scales,): number of the tie that a scale belongs to."""
        owner = np.zeros(self.scale.size, np.intp)
        owner[self.cells] = self.ties[..., None]
        return owner

    def per_tie(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Sums of (groups, rows) values over each tie."""
        sums = np.bincount(self.ties.reshape(-1), values.reshape(-1), minlength=int(self.ties.max()) + 1)
        return sums.astype(np.float64)

    def scaled(self, factors: NDArray[np.floating]) -> WeightGrid:
        """The grid with the scales of each tie multiplied by its factor; block scales stay integer multiples."""
        return self.with_scale(self.scale * factors.astype(np.float32)[self.tie_of_cell])

    def with_scale(self, scale: NDArray[np.floating], multiples: NDArray[np.int32] | None = None) -> WeightGrid:
        """The grid with other scales, flattened; for LPBQ, with other multiples of the channels' scales too."""
        scale = np.maximum(
            np.asarray(scale, np.float32), np.finfo(np.float32).tiny if self.floor is None else self.floor
        )
        kept = self.multiples if multiples is None else multiples
        if kept is not None:
            shape = self.encoding.scale.shape
            unit = (scale / kept).reshape(shape)[:, :1].astype(np.float32)
            scale = (kept.reshape(shape) * unit).astype(np.float32).reshape(-1)
        else:
            scale = self.encoding.typed(scale)
        return replace(self, scale=scale, multiples=kept)

    def chosen(self, take: NDArray[np.bool_], other: WeightGrid) -> WeightGrid:
        """This grid, with the scales of `other` for the ties where `take` holds."""
        which = take[self.tie_of_cell]
        multiples = self.multiples
        if multiples is not None and other.multiples is not None:
            multiples = np.where(which, other.multiples, multiples)
        return replace(self, scale=np.where(which, other.scale, self.scale), multiples=multiples)

    def stored(self, scale: NDArray[np.floating], cells: NDArray[np.intp]) -> NDArray[np.float32]:
        """What `with_scale` makes of some entries, where no multiples are."""
        floor = np.finfo(np.float32).tiny if self.floor is None else self.floor[cells]
        return np.asarray(self.encoding.typed(np.maximum(np.asarray(scale, np.float32), floor)), np.float32)

    @cached_property
    def step(self) -> Matrix:
        """Scale of each element, (groups, rows, 1 or K)."""
        return self.scale[self.cells]

    @cached_property
    def low(self) -> Matrix:
        """Lowest code of each element, (groups, rows, 1 or K); 1 where all are the same."""
        return self._end(self._ends[0])

    @cached_property
    def high(self) -> Matrix:
        """Highest code of each element, (groups, rows, 1 or K); 1 where all are the same."""
        return self._end(self._ends[1])

    def _end(self, code: float) -> Matrix:
        ends = (code - self._zero).astype(np.float32)
        return ends[self.cells if (ends != ends[0]).any() else self.cells[..., :1]]

    @property
    def _ends(self) -> tuple[float, float]:
        if self.encoding.float_format is None:
            return self.encoding.grid.qmin, self.encoding.grid.qmax
        return -largest_of(self.encoding.float_format), largest_of(self.encoding.float_format)

    @property
    def snap(self) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """The nearest codes of a matrix divided by its scales, where nothing bounds them."""
        format = self.encoding.float_format
        return np.rint if format is None else partial(cast_float, format=format)

    @property
    def _zero(self) -> NDArray[np.int64]:
        return self.encoding.zero_point.reshape(-1).astype(np.int64)

    def nearest(self, matrix: NDArray[np.floating]) -> Matrix:
        """Codes of the grid points nearest to a real matrix."""
        codes = np.divide(matrix, self.step, dtype=np.float32)
        return clipped(self.snap(codes), self.low, self.high)

    def neighbours(self, matrix: NDArray[np.floating]) -> tuple[Matrix, Matrix]:
        """Codes just below and just above a real matrix, clipped to the grid; equal where it lies on the grid."""
        codes = np.divide(matrix, self.step, dtype=np.float32)
        return np.clip(np.floor(codes), self.low, self.high), np.clip(np.ceil(codes), self.low, self.high)

    def allowed(self, codes: Matrix, matrix: NDArray[np.floating]) -> Matrix:
        """Codes chosen for a real matrix; where pairs have a limit, no further from it than its neighbours."""
        return codes if self.floor is None else np.clip(codes, *self.neighbours(matrix))

    def values(self, codes: Matrix) -> Matrix:
        """Real values of codes."""
        return np.asarray(codes * self.step)

    def weight(self, codes: Matrix) -> NDArray[np.float32]:
        """Real values of codes as a weight in canonical layout, bit-equal to `Encoding.dequantize` of the codes."""
        matrix = join_columns(self.values(codes), self.blocks)
        return np.asarray(from_matrix(self.op, matrix, self.shape), np.float32)

    def frozen(self, source: str) -> Encoding:
        """The encoding with this grid's scales, which later calibrations keep."""
        before = self.encoding.scale
        scale = self.scale.reshape(before.shape)
        if np.array_equal(scale, before):
            scale = before  # not a copy: of small blocks they are a share of the model
        blocks = None if self.multiples is None else self.multiples.reshape(before.shape)
        return self.encoding.with_(scale=scale, block_scale=blocks, frozen=True, source=source)


def is_block_of_floats(encoding: Encoding) -> bool:
    """Whether values are floats, or of a table, that blocks or channels scale: MXFP4, MXFP8, NVFP4, NF4."""
    return encoding.float_format is not None and (
        encoding.float_format in CODE_TABLES or isinstance(encoding.granularity, Blockwise)
    )
