"""A bank that is open: a dataset that answers with statistics, and has no samples to hand out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch
from bitwright.bank._record import PRECISION, MomentsEntry, Record, Span, read_record
from bitwright.bank._writing import squares
from bitwright.errors import InputError
from bitwright.files import StoredArray, open_npy
from bitwright.graph import ConvAttrs, Op, OpKind, groups_of
from bitwright.runs import of_file, of_json
from bitwright.statistics import HistogramStatistic, LayerMoments
from bitwright.technique import Step


class Bank:
    """Statistics of data that ran through one network, as `collect` writes them; passes for data in `QuantSim`.

    ``sim.calibrate(bank)`` and ``sim.apply("gptq", bank)`` read what they need of it and run nothing. Whatever has to
    run the network (predictions, accuracy) refuses it. Files are checked against their checksums when they are read.

    Args:
        path: the folder.
        record: its index, checked.
    """

    def __init__(self, path: Path, record: Record) -> None:
        self.path, self.record = path, record
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Bank:
        """Open a bank's folder; its arrays are read when they are asked for.

        Raises:
            InputError: it is no bank, of another format, or a file is missing or has another size.
        """
        folder = Path(path)
        bank = cls(folder, read_record(folder))
        for name, entry in bank.record.files.items():
            file = folder / name
            if Path(name).name != name or not file.is_file():
                raise InputError(f"bank {str(folder)!r}: {name!r} is missing; copy the whole folder")
            if (size := file.stat().st_size) != entry.bytes:
                raise InputError(f"bank {str(folder)!r}: {name!r} has {size} bytes in place of {entry.bytes}")
        return bank

    def __iter__(self) -> Iterator[Batch]:
        raise InputError(
            f"this needs data, and bank {str(self.path)!r} has only statistics of them; give samples, or leave out "
            "what has to run the network"
        )

    @property
    def samples(self) -> int | None:
        """How many were seen."""
        return self.record.samples

    def fingerprint(self) -> str:
        """Of all that it holds."""
        files = {name: entry.sha256 for name, entry in self.record.files.items()}
        thin = {} if self.record.thin is None else {"thin": str(self.record.thin)}
        return of_json(files | {"of": self.record.network} | thin)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The techniques that were applied before collecting, without data."""
        return tuple(Step(s.technique, s.settings) for s in self.record.steps)

    @property
    def bytes(self) -> int:
        """Size of all files but the index."""
        return sum(entry.bytes for entry in self.record.files.values())

    def verify(self) -> None:
        """Check every file's checksum.

        Raises:
            InputError: one was changed.
        """
        for name in self.record.files:
            self._verified(name)

    # -- what it holds

    def histogram(self, tensor: str, precision: int | None = None, *, extremes: bool = False) -> HistogramStatistic:
        """A tensor's histogram, joined to fewer mantissa bits.

        Args:
            tensor: its name.
            precision: mantissa bits; None for all.
            extremes: its ends are those of all values, and not of the counted ones.

        Raises:
            InputError: the bank doesn't have it, or not so finely; or its files are damaged.
        """
        entry = self.record.tensors[tensor]
        bits = PRECISION if precision is None else precision
        if bits > PRECISION:
            raise InputError(f"bank {str(self.path)!r}: its histograms have {PRECISION} bits of mantissa, not {bits}")
        histogram = HistogramStatistic(precision=bits, step=entry.step, layout=entry.layout, extremes=extremes)
        codes = self._part("codes.npy", "<u4", entry.bins).astype(np.int64) >> (PRECISION - bits)
        counts = self._part("counts.npy", "<i8", entry.bins)
        if (codes >= 1 << (9 + bits)).any() or (counts < 0).any():
            raise InputError(f"bank {str(self.path)!r}: the histogram of {tensor!r} has bins that there can't be")
        low, high = entry.low, entry.high
        if extremes:
            lows, highs = self.ranges(tensor)
            low, high = min(low, float(lows.min())), max(high, float(highs.max()))
        busy, place = np.unique(codes, return_inverse=True)
        joined = np.zeros((1, len(busy)), np.int64)
        np.add.at(joined[0], place, counts)
        histogram.restore(
            {"precision": np.array(bits), "low": np.array([low]), "high": np.array([high]), "codes": busy,
             "counts": joined}
        )  # fmt: skip
        return histogram

    def ranges(self, tensor: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest and highest value of each channel of a tensor, or of all of it, (channels,).

        Raises:
            InputError: the file is damaged.
        """
        low, high = self._part("ranges.npy", "<f4", self.record.tensors[tensor].channels, rows=2).astype(np.float64)
        if not (low.size and np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise InputError(f"bank {str(self.path)!r}: the range of {tensor!r} is none")
        return low, high

    def blocks(self, op: Op) -> int:
        """In how many blocks the moments of a linear op are kept (`LayerMoments.blocks`)."""
        return self.record.moments[self.record.layers[op.id]].blocks

    def layer(self, op: Op, *, products: bool = True, blocks: int | None = None) -> LayerMoments:
        """The moments of a linear op's input columns; without `products` only the means, of the whole column.

        Args:
            op: the op.
            products: whether second moments are wanted.
            blocks: parts of the columns to take them in, a multiple of those they are kept in; None for these.

        Raises:
            InputError: they aren't this op's, or damaged.
        """
        entry = self.record.moments[self.record.layers[op.id]]
        found = self._moments(entry, op, products, (blocks or entry.blocks) if products else 1)
        found.settle()
        return found

    def moments(self, place: int) -> LayerMoments:
        """Moments by their number in the index: to be added to others, whatever op they are of."""
        entry = self.record.moments[place]
        attrs = ConvAttrs((), (), (), (), entry.groups // entry.blocks)
        op = Op(f"moments {place}", OpKind.CONV, "Conv", (), (), attrs=attrs)
        return self._moments(entry, op, True, entry.blocks)

    def _moments(self, entry: MomentsEntry, op: Op, products: bool, blocks: int) -> LayerMoments:
        features = entry.features * entry.blocks
        if features % blocks or blocks % (entry.blocks if products else 1):
            raise InputError(f"bank {str(self.path)!r}: {op.id!r} is kept in {entry.blocks} blocks, not {blocks}")
        shape = entry.groups * blocks // entry.blocks, features // blocks
        means = self._part("means.npy", "<f8", entry.means, rows=2)
        size = entry.features * (entry.features + 1) // 2
        kind = np.dtype(self.record.number).newbyteorder("<")
        triangle = self._array(entry.file, kind, (entry.groups, size)) if products else None
        # Nothing is made in a size that the files don't have: an index can state any.
        if means.shape[1] != entry.groups * entry.features or groups_of(op) * blocks != shape[0]:
            raise InputError(f"bank {str(self.path)!r}: {op.id!r} has other columns than those it was collected on")
        found = LayerMoments(op, features, paired=False, products=products, blocks=blocks, thin=self.record.thin)
        state: dict[str, NDArray[Any]] = {
            "count": np.array(entry.count), "sum_x": means[0].reshape(shape), "shift_x": means[1].reshape(shape)
        }  # fmt: skip
        if triangle is not None:
            state["xx"] = squares(np.asarray(triangle), entry.features, blocks // entry.blocks)
        if not all(np.isfinite(v).all() for v in state.values()):
            raise InputError(f"bank {str(self.path)!r}: the moments of {op.id!r} aren't finite")
        found.restore(state)
        return found

    # -- files

    def _part(self, name: str, kind: str, span: Span, rows: int | None = None) -> NDArray[Any]:
        whole = self._shared(name, kind, rows)
        start, end = span
        if not 0 <= start <= end <= whole.shape[-1]:
            raise InputError(f"bank {str(self.path)!r}: {name!r} is shorter than its index says")
        if rows is None:
            return np.asarray(whole[start:end])
        return np.stack([np.asarray(whole[row][start:end]) for row in range(rows)])

    def _shared(self, name: str, kind: str, rows: int | None) -> StoredArray:
        if name not in self._arrays:
            self._arrays[name] = self._array(name, np.dtype(kind), (-1,) if rows is None else (rows, -1))
        return self._arrays[name]

    @cached_property
    def _arrays(self) -> dict[str, StoredArray]:
        return {}

    def _array(self, name: str, kind: np.dtype[Any], shape: Sequence[int]) -> StoredArray:
        """A file's array, read in parts; −1 in the shape stands for any length."""
        self._verified(name)
        values = open_npy(self.path / name)
        fits = len(values.shape) == len(shape) and all(n in (-1, m) for n, m in zip(shape, values.shape, strict=True))
        if values.dtype != kind or not fits or not isinstance(values, StoredArray):
            raise InputError(
                f"bank {str(self.path)!r}: {name!r} holds {values.dtype} {values.shape}, expected {kind} {tuple(shape)}"
            )
        return values

    def _verified(self, name: str) -> None:
        if name in self._checked:
            return
        entry, path = self.record.files.get(name), self.path / name
        if entry is None or not path.is_file() or of_file(path) != entry.sha256:
            raise InputError(f"bank {str(self.path)!r}: {name!r} isn't what was collected; copy the bank again")
        self._checked.add(name)
