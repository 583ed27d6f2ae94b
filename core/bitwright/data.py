"""Calibration and evaluation data: batches by input name, re-iterable, checked before any work, never held whole.

Accepted: arrays or a mapping of arrays (first axis is samples), a .npz or .npy path, a folder of images,
or any re-iterable of batches (a list, a DataLoader, a function that returns an iterator).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bitwright.backend import Array, Batch
from bitwright.errors import InputError

InputSpecs = Mapping[str, tuple[tuple[int | None, ...], str]]


@runtime_checkable
class Dataset(Protocol):
    """Batches that can be gone through again and again."""

    def __iter__(self) -> Iterator[Batch]:
        """Start over from the first batch."""

    @property
    def samples(self) -> int | None:
        """How many samples there are, where that is known beforehand."""

    def fingerprint(self) -> str:
        """Content hash: equal data in equal batches give equal fingerprints."""


@dataclass(frozen=True)
class ArrayDataset:
    """Arrays in memory (or memory-mapped), cut into batches."""

    arrays: Mapping[str, Array]
    batch_size: int

    @property
    def samples(self) -> int:
        """Length of the first axis."""
        return len(next(iter(self.arrays.values())))

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.samples, self.batch_size):
            yield {k: np.ascontiguousarray(v[start : start + self.batch_size]) for k, v in self.arrays.items()}

    def fingerprint(self) -> str:
        """Hash of names, dtypes, shapes, contents and batch size."""
        digest = hashlib.sha256(str(self.batch_size).encode())
        for name, values in sorted(self.arrays.items()):
            digest.update(f"{name}{values.dtype}{values.shape}".encode())
            for start in range(0, len(values), 64):
                digest.update(np.ascontiguousarray(values[start : start + 64]).data)
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class IterableDataset:
    """Batches from the user's own re-iterable."""

    start: Callable[[], Iterator[Any]]
    specs: InputSpecs
    count: int | None = None

    @property
    def samples(self) -> int | None:
        """Unknown unless the iterable told."""
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        for index, item in enumerate(self.start()):
            yield check_batch(named_batch(item, self.specs), self.specs, f"batch {index}")

    def fingerprint(self) -> str:
        """Hash over one pass."""
        digest = hashlib.sha256()
        for batch in self:
            for name, values in sorted(batch.items()):
                digest.update(f"{name}{values.dtype}{values.shape}".encode())
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:32]


def named_batch(item: Any, specs: InputSpecs) -> Batch:
    """A batch as the user's iterable gives it (mapping, array, tuple, list) → arrays by input name."""
    raise InputError(f"can't read a batch of type {type(item).__name__} for inputs {list(specs)}")


def check_batch(batch: Batch, specs: InputSpecs, where: str) -> Batch:
    """Check names, ranks, fixed dimensions, dtypes and finiteness; returns the batch with dtypes converted."""
    raise InputError(f"{where}: not checked against {list(specs)}")
