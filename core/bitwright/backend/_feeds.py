"""Feeds that are taken whole although all first axes are equally long: an image (C, H, W) that a detector is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitwright.files import Array
from bitwright.graph import TensorId


class FeedSpecs(dict[TensorId, tuple[tuple[int | None, ...], str]]):
    """Shape and dtype of each input of a model whose first axes aren't samples, which its shapes alone don't tell."""


class Feed(dict[TensorId, Array]):
    """A batch that is one whole feed: one sample, that is never cut along a first axis."""


def arrays_of(batch: Mapping[TensorId, Any]) -> dict[TensorId, Array]:
    """The batch as numpy arrays; a whole feed stays one."""
    arrays = {name: np.asarray(values) for name, values in batch.items()}
    return Feed(arrays) if isinstance(batch, Feed) else arrays
