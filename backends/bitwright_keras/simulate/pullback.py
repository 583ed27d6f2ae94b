"""A part of a simulated network as a function of some of its weights, with gradients by Keras's own backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch
from bitwright.files import Array
from bitwright.graph import ParamId, TensorId
from bitwright_keras.graph.canonical import ParamPlace
from bitwright_keras.graph.engine import as_numpy, pulled_back, with_values
from bitwright_keras.simulate.session import KerasSession

Values = Mapping[ParamId, NDArray[np.floating]]


class KerasPullback:
    """`bitwright.backend.Pullback`.

    Args:
        session: of the simulated model, from feeds to taps.
        places: the variable that each parameter is computed with, and where it is in the float model.
    """

    def __init__(self, session: KerasSession, places: Mapping[ParamId, tuple[keras.Variable, ParamPlace]]) -> None:
        self._session, self._places = session, dict(places)
        variables = [variable for variable, _ in self._places.values()]
        self._forward = with_values(session.compute, variables)
        self._backward = pulled_back(session.compute, variables)

    def run(self, batch: Batch, values: Values) -> Mapping[TensorId, Array]:
        """See `Pullback`."""
        return self._arrays(self._forward(self._natives(values), self._session.tensors(batch)))

    def gradients(
        self,
        batch: Batch,
        values: Values,
        cotangents: Callable[[Mapping[TensorId, Array]], Mapping[TensorId, Array]],
    ) -> Mapping[ParamId, Array]:
        """See `Pullback`."""
        natives, tensors = self._natives(values), self._session.tensors(batch)
        outputs = self._forward(natives, tensors)
        found = cotangents(self._arrays(outputs))
        pulled = [
            keras.ops.convert_to_tensor(found.get(tap.tensor, np.zeros(tuple(y.shape), np.float32)), y.dtype)
            for tap, y in zip(self._session.taps, outputs, strict=True)
        ]
        made = self._backward(natives, tensors, pulled)
        return {
            p: np.array(place.layout.canonical(as_numpy(g)), np.float32, order="C")
            for (p, (_, place)), g in zip(self._places.items(), made, strict=True)
        }

    def _natives(self, values: Values) -> Sequence[Any]:
        return [
            keras.ops.convert_to_tensor(place.layout.to_native(np.asarray(values[p], np.float32)), variable.dtype)
            for p, (variable, place) in self._places.items()
        ]

    def _arrays(self, outputs: Sequence[Any]) -> dict[TensorId, Array]:
        return {tap.tensor: as_numpy(y) for tap, y in zip(self._session.taps, outputs, strict=True)}
