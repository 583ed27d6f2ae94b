"""Layers whose parameters are fake-quantized on the way into their call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from bitwright_keras.graph.engine import value_of
from bitwright_keras.graph.model import variables_of
from bitwright_keras.simulate.fake_quant import FakeQuantize


@keras.saving.register_keras_serializable(package="bitwright")
class QuantizedLayer(keras.layers.Layer):  # type: ignore[misc]
    """A layer that computes with parameters on their grids; it is trained in float, gradients pass straight through.

    Args:
        layer: built; its variables are the trained ones.
        quantizers: by the variable's path below the layer ("kernel").
    """

    def __init__(self, layer: Any, quantizers: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = keras.saving.deserialize_keras_object(layer) if isinstance(layer, dict) else layer
        self.keys = list(quantizers)
        self.quantizers: list[FakeQuantize] = [
            keras.saving.deserialize_keras_object(q) if isinstance(q, dict) else q for q in quantizers.values()
        ]
        self.supports_masking = self.layer.supports_masking

    def build(self, input_shape: Any) -> None:
        """Build the layer, if it isn't."""
        if not self.layer.built:
            self.layer.build(input_shape)

    def quantized(self, training: bool | None = None) -> dict[str, Any]:
        """Parameters on their grids, by path; `training` as `FakeQuantize.call` takes it."""
        variables = variables_of(self.layer)
        pairs = zip(self.keys, self.quantizers, strict=True)
        return {k: q(value_of(variables[k]), training=training) for k, q in pairs}

    def call(self, inputs: Any, training: bool | None = None, **kwargs: Any) -> Any:
        """What the layer computes with quantized parameters; its own updates (moving averages) take place."""
        if training is not None and "training" in self.layer._call_signature.parameters:
            kwargs["training"] = training
        quantized = self.quantized(training)
        by_id = {id(v): quantized[k] for k, v in variables_of(self.layer).items() if k in quantized}
        mapping = [(v, by_id.get(id(v), v.value)) for v in self.layer.variables]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            before = {id(v): scope.get_current_value(v) for v in self.layer.non_trainable_variables}
            result = self.layer(inputs, **kwargs)
            updates = [(v, scope.get_current_value(v)) for v in self.layer.non_trainable_variables]
        for variable, value in updates:
            if value is not before[id(variable)] and id(variable) not in by_id:
                variable.assign(value)
        return result

    def compute_output_spec(self, inputs: Any, training: Any = None, **kwargs: Any) -> Any:
        """As the layer's."""
        return self.layer.compute_output_spec(inputs, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The layer and its quantizers."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "layer": serialize(self.layer),
            "quantizers": {k: serialize(q) for k, q in zip(self.keys, self.quantizers, strict=True)},
        }


@keras.saving.register_keras_serializable(package="bitwright")
class Constant(keras.layers.Layer):  # type: ignore[misc]
    """A constant operand as a weight, so that it can be put on a grid; its input is only there to place it.

    Args:
        shape: of the constant.
    """

    def __init__(self, shape: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = tuple(int(n) for n in shape)
        self.value = self.add_weight(shape=self.shape, initializer="zeros", trainable=False, name="value")
        self.built = True

    def call(self, reference: Any) -> Any:
        """The constant."""
        return ops.convert_to_tensor(self.value.value)

    def compute_output_spec(self, reference: Any) -> Any:
        """The constant's shape."""
        return keras.KerasTensor(self.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Its shape; the value is a weight."""
        return {**super().get_config(), "shape": list(self.shape)}


def constant(value: Any, name: str, dtype: str) -> Constant:
    """A constant with its value."""
    made = Constant(np.shape(value), name=name, dtype=dtype)
    made.value.assign(value)
    return made
