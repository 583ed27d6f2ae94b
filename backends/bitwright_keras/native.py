"""Plain Keras objects of a model in normal form."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import keras

from bitwright.errors import ModelError
from bitwright_keras.model import KerasModel, Spec, execute, substitute, variables_of


def keras_model(model: KerasModel, *, keep: Collection[int] | None = ()) -> keras.Model:
    """A plain functional `keras.Model` that computes the same, with the same input and output structure.

    Args:
        model: in normal form.
        keep: `id`s of layers and operations that become the Keras model's own; of all others it gets copies with
            memory of their own. None keeps all, which is for those that are used nowhere else.
    """
    symbols: dict[str, Any] = {name: input_of(name, model.specs[name]) for name in model.inputs}
    nodes = model.nodes
    if keep is not None:
        made: dict[int, Any] = {}
        for node in nodes:
            key = id(node.operation)
            if key not in made:
                made[key] = node.operation if key in keep else copy_of(node.operation)
        nodes = tuple(replace(node, operation=made[id(node.operation)]) for node in nodes)
    inputs = dict(symbols)
    execute(nodes, symbols)
    result = keras.Model(
        substitute(model.call, lambda ref: inputs[ref.id]),
        substitute(model.outputs, lambda ref: symbols[ref.id]),
        name=model.name,
    )
    return result


def input_of(name: str, spec: Spec) -> Any:
    """A symbolic model input."""
    return keras.Input(batch_shape=spec.shape, dtype=spec.dtype, name=name)


def copy_of(operation: keras.Operation) -> keras.Operation:
    """A copy of a layer or operation under the same name, with its weights in memory of its own."""
    if not isinstance(operation, keras.layers.Layer):
        twin = copy.copy(operation)
        twin.__dict__["_inbound_nodes"], twin.__dict__["_outbound_nodes"] = [], []
        return twin
    return copy_layer(operation)


def copy_layer(
    layer: keras.layers.Layer, *, source: keras.layers.Layer | None = None, **changes: Any
) -> keras.layers.Layer:
    """A layer of the same class with some arguments changed, built as the original, with its weights.

    Args:
        layer: a built layer.
        source: another layer of the same weights to take them from.
        changes: constructor arguments.

    Raises:
        ModelError: the layer can't be made again from its configuration.
    """
    if isinstance(layer, keras.layers.Lambda):
        twin: keras.layers.Layer = keras.layers.Lambda(
            layer.function, layer._output_shape, layer.mask, layer.arguments, name=layer.name, dtype=layer.dtype_policy
        )
        twin.built = True
        return twin
    try:
        config = {**layer.get_config(), **changes}
        twin = type(layer).from_config(config)
    except Exception as error:
        raise ModelError(
            f"layer {layer.name!r} ({type(layer).__name__}) can't be copied: {str(error).strip().splitlines()[0]}; "
            "give the class a get_config() with its constructor's arguments"
        ) from error
    _build_as(twin, layer)
    twin.trainable = layer.trainable
    new = variables_of(twin)
    for key, variable in variables_of(layer if source is None else source).items():
        if key in new and new[key].shape == variable.shape:
            new[key].assign(variable.value)
    return twin


def _build_as(twin: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    if not layer.built or twin.built:
        return
    config = layer.get_build_config()
    if config:
        twin.build_from_config(config)
    else:
        twin.build(None)
