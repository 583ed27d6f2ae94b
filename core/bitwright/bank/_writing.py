"""Writing a bank: into a folder beside, which takes its name when all is there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from os import getpid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.bank._record import INDEX, FileEntry, MomentsEntry, Number, Record, Span, StepEntry, TensorEntry
from bitwright.errors import InputError
from bitwright.files import atomic_write, cannot_write, make_directory, sweep_beside, sync_directory, write_text
from bitwright.runs import of_file
from bitwright.statistics import HistogramStatistic, LayerMoments, finite


class Writer:
    """Takes statistics one after another; the folder is there, whole, after `finish`, and nothing is without it.

    Args:
        out: the folder; it isn't there yet, or is empty.
        number: type of the second moments.
        thin: what the moments count, see `Record`.

    Attributes:
        folder: that is written to, until `finish`.

    Raises:
        InputError: something is there, or the folder can't be written.
    """

    def __init__(self, out: Path, number: Number, thin: int | None = None) -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{str(out)!r} is there already; give another folder for the bank, or remove it")
        self.out, self.number, self.thin = out, number, thin
        self.folder = out.with_name(f".{out.name}.{getpid()}.partial")
        self._codes: list[NDArray[Any]] = []
        self._counts: list[NDArray[Any]] = []
        self._ranges: list[NDArray[Any]] = []
        self._means: list[NDArray[Any]] = []
        self.tensors: dict[str, TensorEntry] = {}
        self.moments: list[MomentsEntry] = []
        self._files: dict[str, FileEntry] = {}

    def __enter__(self) -> Self:
        make_directory(self.out.parent)
        sweep_beside(self.out)
        try:
            self.folder.mkdir()
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add_tensor(
        self, tensor: str, histogram: HistogramStatistic, axis: int | None, low: NDArray[Any], high: NDArray[Any]
    ) -> None:
        """A tensor's histogram, and its range or those of its channels on `axis`."""
        state = histogram.state()
        bins = _appended(self._codes, np.asarray(state["codes"], "<u4"))
        _appended(self._counts, np.asarray(state["counts"][0], "<i8"))
        channels = _appended(self._ranges, np.stack([np.atleast_1d(low), np.atleast_1d(high)]).astype("<f4"))
        self.tensors[tensor] = TensorEntry(
            axis=axis, step=histogram.step, layout=histogram.layout, bins=bins, channels=channels,
            low=float(histogram.low[0]), high=float(histogram.high[0]),
        )  # fmt: skip

    def add_moments(self, moments: LayerMoments) -> int | None:
        """Moments of a layer's columns; their number, or None where they don't fit the type."""
        state = moments.state()
        triangle = _triangle(state["xx"], np.dtype(self.number).newbyteorder("<"))
        if not finite([triangle]):
            return None
        groups, features = state["sum_x"].shape
        name = f"moments-{len(self.moments)}.npy"
        self._write(name, triangle)
        means = np.stack([state["sum_x"].reshape(-1), state["shift_x"].reshape(-1)]).astype("<f8")
        span = _appended(self._means, means)
        self.moments.append(
            MomentsEntry(
                file=name,
                groups=groups,
                features=features,
                count=int(state["count"]),
                means=span,
                blocks=moments.blocks,
            )
        )
        return len(self.moments) - 1

    def finish(
        self,
        *,
        network: str,
        steps: Sequence[StepEntry],
        samples: int,
        data: Sequence[str],
        versions: Mapping[str, str],
        layers: Mapping[str, int],
        left_out: Mapping[str, str],
    ) -> Record:
        """Write what is left and the index, and give the folder its name.

        Raises:
            InputError: the disk is full, or another process has written there in the meantime.
        """
        for name, parts, empty in (
            ("codes", self._codes, np.zeros(0, "<u4")),
            ("counts", self._counts, np.zeros(0, "<i8")),
            ("ranges", self._ranges, np.zeros((2, 0), "<f4")),
            ("means", self._means, np.zeros((2, 0), "<f8")),
        ):
            self._write(f"{name}.npy", np.concatenate([empty, *parts], axis=-1))
        record = Record(
            network=network, steps=tuple(steps), samples=samples, data=tuple(data), versions=dict(versions),
            number=self.number, thin=self.thin, tensors=self.tensors, moments=tuple(self.moments), layers=dict(layers),
            left_out=dict(left_out), files=self._files,
        )  # fmt: skip
        write_text(self.folder / INDEX, record.text())
        try:
            self.folder.rename(self.out)
        except OSError as error:
            raise cannot_write(self.out, error) from error
        sync_directory(self.out.parent)
        return record

    def _write(self, name: str, values: NDArray[Any]) -> None:
        path = self.folder / name
        with atomic_write(path) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(values), allow_pickle=False)
        self._files[name] = FileEntry(sha256=of_file(path), bytes=path.stat().st_size)


def _appended(parts: list[NDArray[Any]], values: NDArray[Any]) -> Span:
    start = sum(p.shape[-1] for p in parts)
    parts.append(values)
    return start, start + values.shape[-1]


def _triangle(products: NDArray[np.floating[Any]], number: np.dtype[Any]) -> NDArray[np.floating[Any]]:
    """(groups, K, K) → (groups, K (K + 1) / 2)."""
    groups, features = products.shape[:2]
    flat = np.empty((groups, features * (features + 1) // 2), number)
    end = 0
    with np.errstate(over="ignore"):
        for row in range(features):
            start, end = end, end + features - row
            flat[:, start:end] = products[:, row, row:]
    return flat


def squares(triangle: NDArray[Any], features: int, blocks: int = 1) -> NDArray[np.float64]:
    """(groups, K (K + 1) / 2) → symmetric (groups · blocks, K / blocks, K / blocks): those along the diagonal."""
    size = features // blocks
    products = np.empty((len(triangle), blocks, size, size))
    end = 0
    for row in range(features):
        start, end = end, end + features - row
        block, at = divmod(row, size)
        values = triangle[:, start : start + size - at]
        products[:, block, at, at:] = values
        products[:, block, at:, at] = values
    return products.reshape(-1, size, size)
