"""The float model as a `keras.Model` that reports what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from bitwright.backend import Batch
from bitwright_keras.graph.engine import as_numpy, is_symbolic
from bitwright_keras.graph.model import KerasModel, refs
from bitwright_keras.graph.native import keras_model


class ObservedModel(keras.Model):  # type: ignore[misc]
    """Called as the user's model is, or run by `predict` and `evaluate`, which never compile it: values must be seen.

    Args:
        model: in normal form; the weights are copied.
        seen: is called with the inputs of each run.
    """

    def __init__(self, model: KerasModel, seen: Callable[[Batch], None]) -> None:
        super().__init__(name=model.name)
        self.network = keras_model(model)
        self.built = True
        self._names = tuple(refs(model.call))
        self._seen = seen

    @property
    def run_eagerly(self) -> bool:
        """Always: a compiled function would report its tracing."""
        return True

    @run_eagerly.setter
    def run_eagerly(self, value: bool) -> None:
        pass

    @property
    def inputs(self) -> Any:
        """The symbolic inputs, as of the user's model."""
        return self.network.inputs

    @property
    def outputs(self) -> Any:
        """The symbolic outputs, as of the user's model."""
        return self.network.outputs

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """As the user's model."""
        leaves = self._leaves(inputs)
        if not any(map(is_symbolic, leaves)):
            self._seen({name: as_numpy(leaf) for name, leaf in zip(self._names, leaves, strict=True)})
        return self.network(inputs, training=training)

    def _leaves(self, inputs: Any) -> list[Any]:
        """The inputs in the order of `_names`: by name where they are a mapping, as Keras takes them."""
        if isinstance(inputs, dict):
            known = {x.name: i for i, x in enumerate(self.network.inputs)}
            if set(known) <= set(inputs):
                return [inputs[name] for name in self._names]
        return list(keras.tree.flatten(inputs))
