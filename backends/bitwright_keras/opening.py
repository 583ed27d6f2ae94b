"""The user's model at the door: its recorded calls, and the comparison of what was captured with the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from bitwright.errors import InputError, ModelError
from bitwright_keras.model import KerasModel, execute, refs, substitute
from bitwright_keras.native import copy_layer
from bitwright_keras.tracing import Recording, functional_of, recorded, trace


def recording_of(model: keras.Model, sample: Any) -> tuple[Recording, bool]:
    """The model's calls, and whether they come from its `call`."""
    functional = functional_of(model)
    if functional is None and isinstance(model, keras.Sequential) and sample is not None:
        twin = keras.Sequential([copy_layer(x) if x.built else x for x in model.layers], name=model.name)
        twin.build((None, *np.shape(_arrays(sample)[0])[1:]))
        functional = functional_of(twin)
    if functional is not None:
        return recorded(functional), False
    if isinstance(model, keras.Sequential):
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
        model(_tensors(sample))
    return trace(model, (symbols,), {}), True


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


def compare(model: keras.Model, normal: KerasModel, sample: Any, traced: Sequence[str]) -> None:
    """Refuse a capture that computes something else than the model."""
    batch = _batch(normal, sample)
    try:
        expected = keras.tree.flatten(model(substitute(normal.call, lambda ref: batch[ref.id]), training=False))
    except Exception as error:
        if sample is None:  # made-up numbers needn't suit the model
            return
        raise InputError(f"the sample doesn't fit the model: {str(error).splitlines()[0]}") from error
    values: dict[str, Any] = dict(batch)
    execute(normal.nodes, values)
    found = [values[t] for t in refs(normal.outputs)]
    for x, y in zip(expected, found, strict=True):
        a, b = (np.asarray(keras.ops.convert_to_numpy(v), np.float64) for v in (x, y))
        near = 1e-4 * max(float(np.abs(a).max(initial=0)), 1.0)
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-3, atol=near):
            raise ModelError(
                f"capturing {', '.join(map(repr, traced)) or repr(model.name)} through call() gives other results than "
                "calling it: it depends on Python state, on values, or on the batch's shape; compute with "
                "keras.layers and keras.ops only"
            )


def _batch(normal: KerasModel, sample: Any) -> dict[str, Any]:
    if sample is not None:
        flat = [sample[t] for t in normal.inputs] if isinstance(sample, Mapping) else _arrays(sample)
        return {
            t: keras.ops.convert_to_tensor(np.asarray(x), dtype=normal.specs[t].dtype)
            for t, x in zip(normal.inputs, flat, strict=True)
        }
    rng = np.random.default_rng(0)
    batch = {}
    for t in normal.inputs:
        spec = normal.specs[t]
        shape = [2 if i == 0 and n is None else 8 if n is None else n for i, n in enumerate(spec.shape)]
        drawn = rng.normal(size=shape) if spec.dtype.startswith(("float", "bfloat")) else np.ones(shape)
        batch[t] = keras.ops.convert_to_tensor(drawn, dtype=spec.dtype)
    return batch
