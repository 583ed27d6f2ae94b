"""Parameter values in and out of a model, in canonical layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bitwright.backend import checked_param, known_param
from bitwright.graph import ParamId
from bitwright_keras.graph.canonical import ParamPlace, canonical
from bitwright_keras.graph.constants import constant_of, with_constant
from bitwright_keras.graph.engine import value_of
from bitwright_keras.graph.model import KerasModel, Node, variables_of
from bitwright_keras.graph.native import copy_layer


def read_params(model: KerasModel, ids: Collection[ParamId]) -> dict[ParamId, NDArray[np.float32]]:
    """Values in canonical layout, float32.

    Raises:
        ModelError: an id names no float parameter.
    """
    places = canonical(model).places
    values: dict[ParamId, NDArray[np.float32]] = {}
    for id in ids:
        place = known_param(places, id)
        with np.errstate(over="ignore"):  # the lowest double, in a mask, is −∞
            values[id] = np.array(place.layout.canonical(native_value(place)), np.float32, order="C")
    return values


def native_value(place: ParamPlace) -> NDArray[Any]:
    """A parameter's value as Keras has it."""
    variable = place.variable
    if variable is None:
        return np.asarray(constant_of(place.node, place.key), np.float32)
    return array_of(variable)


def array_of(variable: keras.Variable) -> NDArray[Any]:
    """A variable's value; bfloat16 as float32."""
    value = np.asarray(keras.ops.convert_to_numpy(value_of(variable)))
    return value.astype(np.float32) if value.dtype.kind != "f" else value


def native_values(model: KerasModel, values: Mapping[ParamId, NDArray[np.floating]]) -> dict[ParamId, NDArray[Any]]:
    """New values as Keras has them.

    Raises:
        ModelError: an id names no float parameter, a shape differs, or a value isn't finite.
    """
    places, found = canonical(model).places, {}
    for id, value in values.items():
        layout = known_param(places, id).layout
        found[id] = layout.to_native(checked_param(id, value, layout.shape).astype(np.float32, copy=False))
    return found


def with_values(model: KerasModel, values: Mapping[ParamId, NDArray[np.floating]]) -> KerasModel:
    """A model with some parameters changed; layers that have none of them are shared.

    Raises:
        ModelError: an id names no float parameter, a shape differs, or a value isn't finite.
    """
    places = canonical(model).places
    layers: dict[int, dict[str, NDArray[Any]]] = {}
    constants: dict[str, dict[str, NDArray[Any]]] = {}
    for id, native in native_values(model, values).items():
        place = places[id]
        if place.node.layer is None:
            constants.setdefault(place.node.op, {})[place.key] = native
        else:
            layers.setdefault(id_of(place.node), {})[place.key] = native
    made: dict[int, keras.layers.Layer] = {}
    nodes = []
    for node in model.nodes:
        for key, native in constants.get(node.op, {}).items():
            node = with_constant(node, key, native)
        if node.layer is not None and (changed := layers.get(id_of(node))):
            if id_of(node) not in made:
                made[id_of(node)] = with_variables(node.layer, changed)
            node = replace(node, operation=made[id_of(node)])
        nodes.append(node)
    return model.with_(nodes=tuple(nodes))


def with_variables(layer: keras.layers.Layer, values: Mapping[str, NDArray[Any]]) -> keras.layers.Layer:
    """A copy of a layer with some variables changed."""
    twin = copy_layer(layer)
    variables = variables_of(twin)
    for key, value in values.items():
        variables[key].assign(value)
    return twin


def id_of(node: Node) -> int:
    """Identity of a call's layer."""
    return id(node.operation)
