"""Values of parameters that are read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from bitwright.files import Array
from bitwright.graph import ParamId


class LazyValues(Mapping[ParamId, Array]):
    """Parameters' values, of which none is in memory but those that somebody holds: each look reads one anew.

    Args:
        reads: parameter → what reads its values.
    """

    def __init__(self, reads: Mapping[ParamId, Callable[[], Array]]) -> None:
        self._reads = dict(reads)

    def __getitem__(self, param: ParamId) -> Array:
        return np.asarray(self._reads[param]())

    def __iter__(self) -> Iterator[ParamId]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)
