"""A model's parameters as a mapping that reads one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend._protocols import Backend
from bitwright.graph import Graph, ParamId

Params = Mapping[ParamId, NDArray[np.float32]]
"""Parameter values by id, canonical layout."""


class ParamReader(Mapping[ParamId, NDArray[np.float32]]):
    """A model's parameters, read one at a time when they are asked for."""

    def __init__(self, backend: Backend[Any], model: object, graph: Graph) -> None:
        self._backend, self._model, self._graph = backend, model, graph

    def __getitem__(self, id: ParamId) -> NDArray[np.float32]:
        if id not in self._graph.params:
            raise KeyError(id)
        values = np.asarray(self._backend.read(self._model, [id])[id], np.float32).view()
        values.flags.writeable = False  # the model's own memory, perhaps
        return values

    def __iter__(self) -> Iterator[ParamId]:
        return iter(self._graph.params)

    def __len__(self) -> int:
        return len(self._graph.params)
