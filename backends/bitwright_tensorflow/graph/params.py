"""Parameter values in and out of the model, in canonical layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bitwright.backend import checked_param, known_param
from bitwright.errors import ModelError
from bitwright.graph import ParamId
from bitwright_tensorflow.graph.canonical import recognize
from bitwright_tensorflow.graph.model import Array, TfModel, array_of
from bitwright_tensorflow.graph.network import Read


def read_params(model: TfModel, ids: Collection[ParamId]) -> dict[ParamId, NDArray[np.float32]]:
    """Values in canonical layout, float32.

    Raises:
        ModelError: an id names no float parameter.
    """
    return {id: to_canonical(model, read_of(model, id)) for id in ids}


def read_of(model: TfModel, id: ParamId) -> Read:
    """Where a parameter lies.

    Raises:
        ModelError: there is no such parameter.
    """
    return known_param(recognize(model).params, id)


def native_value(model: TfModel, source: str) -> Array:
    """Contents of a variable or constant, as TensorFlow holds them."""
    if source in model.values:
        return model.values[source]
    node = recognize(model).network.inference.wiring.node(source)
    if node.op != "Const":
        raise ModelError(f"variable {source!r} has no value")
    return array_of(node.attr["value"].tensor)


def to_canonical(model: TfModel, read: Read) -> NDArray[np.float32]:
    """A parameter's values as its op sees them in canonical layout: the reader's own, whatever they are used for."""
    with np.errstate(over="ignore"):  # the lowest double, in a mask, is −∞
        return np.array(read.form.canonical(native_value(model, read.source)), np.float32, order="C")


def checked_native(read: Read, value: NDArray[np.floating], id: ParamId) -> Array:
    """New values in native layout and type.

    Raises:
        ModelError: the shape differs, or a value isn't finite.
    """
    return read.form.to_native(checked_param(id, value, read.form.shape)).astype(numpy_dtype(read.dtype))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """A TensorFlow type's numpy type."""
    found: np.dtype[Any] = np.dtype(tf.as_dtype(name).as_numpy_dtype)
    return found


def native_values(model: TfModel, values: Mapping[ParamId, NDArray[np.floating]]) -> dict[str, Array]:
    """New contents of variables and constants by node, checked before anything is set.

    Raises:
        ModelError: an id names no float parameter, a shape differs, or a value isn't finite.
    """
    reads = {id: read_of(model, id) for id in values}
    return {read.source: checked_native(read, values[id], id) for id, read in reads.items()}
