"""Which samples of a dataset are used: the first so many, and the labels that are theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, class_indices
from bitwright.data._batches import first_samples, samples_in
from bitwright.data._dataset import Dataset, IterableDataset
from bitwright.errors import InputError
from bitwright.runs import of_json


class FirstSamples:
    """The first samples of a dataset, in its batches.

    Args:
        data: the dataset.
        limit: how many samples; None takes all.
        fixed: the batch size that the model fixes, if it does: batches are then taken whole, until there are as many.

    Raises:
        InputError: the limit is below 1.
    """

    def __init__(self, data: Dataset, limit: int | None, fixed: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"{limit} samples: use at least one")
        self._data, self._limit = data, limit if limit is None else whole_batches(limit, fixed)

    def __iter__(self) -> Iterator[Batch]:
        left = self._limit
        for batch in self._data:
            size = samples_in(batch)
            if left is not None and left <= size:
                yield first_samples(batch, left)
                return
            yield batch
            left = None if left is None else left - size

    @property
    def samples(self) -> int | None:
        """How many there are, where that is known."""
        known = self._data.samples
        return known if self._limit is None else self._limit if known is None else min(known, self._limit)

    def fingerprint(self) -> str:
        """Of the whole dataset and the limit."""
        return of_json([self._data.fingerprint(), self._limit])


def whole_batches(samples: int, fixed: int | None) -> int:
    """A number of samples, rounded up to whole batches where the model fixes their size."""
    return samples if fixed is None else math.ceil(samples / fixed) * fixed


def labels_of(
    labels: object, data: Dataset, *, limit: int | None = None, fixed: int | None = None
) -> NDArray[np.int64]:
    """Class indices, one for each sample of a dataset.

    Args:
        labels: of the samples that the dataset was opened on: those beyond the limit, and where the model fixes the
            batch size, those of samples that don't fill the last batch, are left out too.
        data: the dataset.
        limit: the first so many samples that the dataset was opened with; None for all.
        fixed: the batch size that the model fixes, if it does.

    Raises:
        InputError: `backend.class_indices` doesn't take them, or there aren't as many as samples.
    """
    values, samples = class_indices(labels, "labels")[:limit], data.samples
    # Batches of the user's own may lose samples each, so that it isn't known which labels are those.
    if fixed is not None and samples is not None and not isinstance(data, IterableDataset):
        values = values[:samples] if 0 < len(values) - samples < fixed else values
    if samples is not None and len(values) != samples:
        raise InputError(f"there are {len(values)} labels for {samples} samples: give one label a sample")
    return values
