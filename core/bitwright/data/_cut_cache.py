"""What crosses from one part of a network to the next, for every batch: in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch
from bitwright.files import Scratch, cannot_write
from bitwright.graph import TensorId

CACHE_BYTES = 128 * 2**20
"""Memory for the tensors of one cut, both networks together; what exceeds it goes to disk."""


class CutCache:
    """The tensors of one cut for every batch, in memory up to `budget` bytes and in a temporary folder beyond."""

    def __init__(self, budget: int = CACHE_BYTES) -> None:
        self._budget = budget
        self._held = 0
        self._batches: list[dict[TensorId, NDArray[Any] | Path]] = []
        self._folder: Scratch | None = None

    def append(self, batch: Mapping[TensorId, NDArray[Any]]) -> None:
        """Keep one more batch.

        Raises:
            WriteError: the disk is full.
        """
        kept: dict[TensorId, NDArray[Any] | Path] = {}
        for name, values in batch.items():
            if self._held + values.nbytes > self._budget:
                kept[name] = self._spill(values, len(self._batches), len(kept))
            else:
                self._held += values.nbytes
                kept[name] = values
        self._batches.append(kept)

    def _spill(self, values: NDArray[Any], batch: int, index: int) -> Path:
        if self._folder is None:
            self._folder = Scratch()
        path = self._folder.path / f"{batch}-{index}.npy"
        try:
            np.save(path, values, allow_pickle=False)
        except OSError as error:
            raise cannot_write(path, error) from error
        return path

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        """One batch."""
        # Read when its turn comes: a map of the file would stay in the process's memory.
        held = self._batches[index].items()
        return {t: np.load(v, allow_pickle=False) if isinstance(v, Path) else v for t, v in held}

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        """Free memory and disk."""
        self._batches = []
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def close_all(caches: Iterable[CutCache]) -> None:
    """Close each, though another can't be closed."""
    with ExitStack() as opened:
        for cache in caches:
            opened.callback(cache.close)
