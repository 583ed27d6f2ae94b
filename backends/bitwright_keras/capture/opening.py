"""The user's model at the door: its recorded calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from bitwright.errors import ModelError
from bitwright_keras.capture.tracing import Recording, functional_of, recorded, trace
from bitwright_keras.graph.native import copy_layer, first_line


def recording_of(model: keras.Model, sample: Any) -> tuple[Recording, keras.Model]:
    """The model's calls, and a model that makes them: itself, or a twin of a Sequential that isn't built."""
    functional = functional_of(model)
    plain = type(model) is keras.Sequential
    if functional is None and plain and sample is not None:
        twin = keras.Sequential([copy_layer(x) if x.built else x for x in model.layers], name=model.name)
        twin.build((None, *np.shape(_arrays(sample)[0])[1:]))
        functional, model = functional_of(twin), twin
    if functional is not None:
        return recorded(functional), model
    if plain:
        raise ModelError(
            f"{model.name!r} has no input shape yet: call model.build(shape), or give a sample batch: "
            "QuantSim(model, sample, …)"
        )
    symbols = _symbolic(model, sample)
    if not model.built or any(not layer.built for layer in model._flatten_layers()):
        if sample is None:
            raise ModelError(
                f"the subclassed model {model.name!r} was never called, so it has no weights yet: call it on a batch "
                "first, or give a sample batch: QuantSim(model, sample, …)"
            )
        try:
            model(_tensors(sample))
        except Exception as error:  # whatever the user's Python raises
            raise ModelError(f"calling {model.name!r} on the sample fails: {first_line(error)}") from error
    return trace(model, (symbols,), {}), model


def _symbolic(model: keras.Model, sample: Any) -> Any:
    """Symbolic inputs for a subclassed model: by the sample, or by the shapes that it was built with."""
    if sample is not None:
        index = iter(range(1000))

        def symbol(path_value: Any) -> Any:
            array = np.asarray(path_value)
            dtype = "float32" if array.dtype.kind == "f" else "int32" if array.dtype.kind in "iu" else "bool"
            return keras.KerasTensor((None, *array.shape[1:]), dtype=dtype, name=f"input_{next(index)}")

        if isinstance(sample, Mapping):
            named = {k: symbol(v) for k, v in sample.items()}
            for key, value in named.items():
                value.name = key
            return named
        return keras.tree.map_structure(symbol, sample)
    inputs = getattr(model, "inputs", None)
    if inputs:
        return inputs[0] if len(inputs) == 1 else list(inputs)
    shapes = model._build_shapes_dict or {}
    if len(shapes) == 1:
        (shape,) = shapes.values()
        if isinstance(shape, list | tuple) and all(n is None or isinstance(n, int) for n in shape):
            return keras.KerasTensor((None, *shape[1:]), name="input")
    raise ModelError(
        f"the subclassed model {model.name!r} doesn't tell the shape of its inputs: give a sample batch: "
        "QuantSim(model, sample, …)"
    )


def _tensors(sample: Any) -> Any:
    return keras.tree.map_structure(lambda x: keras.ops.convert_to_tensor(np.asarray(x)), sample)


def _arrays(sample: Any) -> list[Any]:
    return [np.asarray(x) for x in keras.tree.flatten(sample)]
