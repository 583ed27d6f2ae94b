"""A model to be run by the user's own code, which reports what it was fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bitwright.backend._protocols import Backend, Batch, Observable
from bitwright.backend._taps import Tap
from bitwright.errors import InputError
from bitwright.files import Array

Seen = Callable[[Batch], None]


def observed(backend: Backend[Any], model: object, seen: Seen) -> Any:
    """The float model in the form in which its framework runs one (`Observable`), otherwise an `ObservedModel`."""
    return backend.observed(model, seen) if isinstance(backend, Observable) else ObservedModel(backend, model, seen)


class ObservedModel:
    """A model as a function of arrays, by position, by name or in one mapping; of backends that have no other form.

    Args:
        backend: runs it.
        model: the float model.
        seen: is called with the inputs of each run.
    """

    def __init__(self, backend: Backend[Any], model: object, seen: Seen) -> None:
        self.inputs = tuple(backend.input_specs(model))
        self._taps = [Tap(t) for t in backend.graph(model).outputs]
        self._session = backend.session(model, self._taps)
        self._seen = seen

    def __call__(self, *arrays: object, **named: object) -> Array | dict[str, Array]:
        """Run it; one array, or a mapping by output where there are several.

        Raises:
            InputError: an input is missing or unknown.
        """
        batch = self._batch(arrays, named)
        self._seen(batch)
        found: dict[str, Array] = {tap.tensor: np.asarray(v) for tap, v in self._session.run(batch).items()}
        return next(iter(found.values())) if len(found) == 1 else found

    def _batch(self, arrays: tuple[object, ...], named: Mapping[str, object]) -> dict[str, Any]:
        if len(arrays) == 1 and not named and isinstance(arrays[0], Mapping):
            batch = dict(arrays[0])
        else:
            batch = {**dict(zip(self.inputs, arrays, strict=False)), **named}
        if len(arrays) > len(self.inputs) or batch.keys() != set(self.inputs):
            raise InputError(f"the model takes {', '.join(map(repr, self.inputs))}, by position or by name")
        return batch
