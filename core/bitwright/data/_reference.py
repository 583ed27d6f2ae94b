"""The first samples of data that go by, kept to compare networks on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from bitwright.backend import Batch
from bitwright.data._batches import InputSpecs, first_samples
from bitwright.data._dataset import Dataset

SAMPLES = 4
"""Reference samples of an export unless it is asked for another number."""
KEPT_BYTES = 32 * 2**20
"""Bytes of inputs that are kept at most; one sample (or one fixed batch) is kept whatever its size."""


@dataclass(frozen=True)
class Samples:
    """Model inputs by name, one batch.

    Attributes:
        inputs: arrays as the model takes them.
        synthetic: made up from the inputs' grids, for lack of data.
        whole: the model fixes the size of the batch.
        entire: the batch that the samples were cut from, for models whose samples don't run apart from one another
            (rows that are read by index); None where nothing was cut off, or too many bytes were.
    """

    inputs: Batch
    synthetic: bool = False
    whole: bool = False
    entire: Batch | None = None

    def first(self, count: int) -> Samples:
        """At most so many of the samples, out of the whole batch where that is kept; all where their axis isn't known
        or the batch is fixed."""
        held = self.inputs if self.entire is None else self.entire
        return self if self.whole else replace(self, inputs=first_samples(held, count))

    def uncut(self) -> Samples | None:
        """The whole batch that the samples are the first ones of; None where it isn't kept."""
        return None if self.entire is None else replace(self, inputs=self.entire, whole=True, entire=None)


def kept(batch: Batch, specs: InputSpecs, count: int = SAMPLES) -> Samples:
    """Copies of the first samples of a batch, within `KEPT_BYTES`; a batch whose size the model fixes is kept whole.

    The whole batch is kept too where it stays within these bytes (`Samples.entire`).
    """
    fixed = is_fixed(specs)
    batch = {name: np.asarray(values) for name, values in batch.items()}
    size = sum(v.nbytes for v in batch.values())
    if not fixed:
        part = first_samples(batch, count)
        held = sum(v.nbytes for v in part.values())
        while count > 1 and held > KEPT_BYTES:
            count -= 1
            part = first_samples(batch, count)
            held = sum(v.nbytes for v in part.values())
        if held < size <= KEPT_BYTES:
            entire = {name: values.copy() for name, values in batch.items()}
            return Samples(first_samples(entire, count), entire=entire)
        if held < size:
            return Samples({name: values.copy() for name, values in part.items()})
    return Samples({name: np.array(values) for name, values in batch.items()}, whole=fixed)


def is_fixed(specs: InputSpecs) -> bool:
    """Whether batches must be taken whole: an input fixes their size, or has no axis of samples."""
    return any(not shape or shape[0] is not None for shape, _ in specs.values())


class Remembering:
    """A dataset that hands out another's batches, and keeps the first samples that go by.

    Attributes:
        seen: them; None until the first batch came.
    """

    def __init__(self, data: Dataset, specs: InputSpecs) -> None:
        self._data, self._specs = data, specs
        self.seen: Samples | None = None

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            if self.seen is None:
                self.seen = kept(batch, self._specs)
            yield batch

    @property
    def samples(self) -> int | None:
        """As many as the dataset itself has."""
        return self._data.samples

    def fingerprint(self) -> str:
        """The dataset's own."""
        return self._data.fingerprint()

    def taken(self) -> Samples | None:
        """What went by; where nothing did (a stored result was used), the first batch is fetched."""
        if self.seen is None:
            first = next(iter(self._data), None)
            self.seen = None if first is None else kept(first, self._specs)
        return self.seen
