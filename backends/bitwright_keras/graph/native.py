"""Plain Keras objects of a model in normal form."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import keras

from bitwright.errors import ModelError
from bitwright_keras.graph.model import KerasModel, Spec, execute, substitute, variables_of


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
    layer: keras.layers.Layer,
    *,
    source: keras.layers.Layer | None = None,
    called: tuple[Any, Any] | None = None,
    **changes: Any,
) -> keras.layers.Layer:
    """A layer of the same class with some arguments changed, built as the original, with its weights.

    Args:
        layer: a built layer.
        source: another layer of the same weights to take them from.
        called: arguments (positional, by keyword) of one of its calls, with KerasTensors: where building alone doesn't
            make all weights, as in a layer without `build` that has layers in it, the copy is called on such tensors.
        changes: constructor arguments.

    Raises:
        ModelError: the layer can't be made again from its configuration, with all of its weights.
    """
    if isinstance(layer, keras.layers.Lambda):
        twin: keras.layers.Layer = keras.layers.Lambda(
            layer.function, layer._output_shape, layer.mask, layer.arguments, name=layer.name, dtype=layer.dtype_policy
        )
        twin.built = True
        return twin
    origin = layer if source is None else source
    twin, problem = _made(layer, changes), ""
    try:
        _build_as(twin, layer)
    except Exception as error:
        problem = first_line(error)
    pairs = counterparts(twin, origin)
    if pairs is None and not set(changes) - {"name"}:
        found = called or _first_call(layer)
        if found is not None:
            twin = _made(layer, changes)
            problem = _built_by_call(twin, found)
            pairs = counterparts(twin, origin)
        if pairs is None:
            missing = f"its copy has {len(variables_of(twin))} of its {len(variables_of(origin))} weights"
            raise _uncopied(layer, problem or missing)
    elif pairs is None:  # other arguments may give it other weights
        new, old = variables_of(twin), variables_of(origin)
        pairs = [(new[key], old[key]) for key in old if key in new and new[key].shape == old[key].shape]
    elif problem:
        raise _uncopied(layer, problem)
    twin.trainable = layer.trainable
    for mine, theirs in pairs:
        mine.assign(theirs.value)
    return twin


def first_line(error: BaseException) -> str:
    """What an error says, in one line, without the frame that Keras puts around it."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("Exception encountered")]
    return (told or [type(error).__name__])[0][:300]


def _uncopied(layer: keras.layers.Layer, why: str) -> ModelError:
    return ModelError(
        f"layer {layer.name!r} ({type(layer).__name__}) can't be copied: {why}; give the class a get_config() with "
        "its constructor's arguments, and a build() that builds all of its layers"
    )


def _made(layer: keras.layers.Layer, changes: Mapping[str, Any]) -> keras.layers.Layer:
    try:
        return type(layer).from_config({**layer.get_config(), **changes})
    except Exception as error:
        raise _uncopied(layer, first_line(error)) from error


def _build_as(twin: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Build a layer and the layers in it by the shapes that the original's were built with."""
    if layer.built and not twin.built:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a `build\\(\\)` method.*")
            config = layer.get_build_config()
            if config:
                twin.build_from_config(config)
            else:
                twin.build(None)
    for mine, theirs in zip(twin._layers, layer._layers, strict=False):
        if type(mine) is type(theirs):
            _build_as(mine, theirs)


def _first_call(layer: keras.layers.Layer) -> tuple[Any, Any] | None:
    nodes = layer._inbound_nodes
    return (nodes[0].arguments.args, nodes[0].arguments.kwargs) if nodes else None


def _built_by_call(layer: keras.layers.Layer, called: tuple[Any, Any]) -> str:
    """Call a layer on symbolic tensors, so that all of its weights are made; what stands in the way, if anything."""
    args, kwargs = keras.tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, dtype=x.dtype) if isinstance(x, keras.KerasTensor) else x,
        (tuple(called[0]), dict(called[1])),
    )
    try:
        layer(*args, **kwargs)
    except Exception as error:
        return first_line(error)
    finally:
        del layer._inbound_nodes[:]
    return ""


def counterparts(twin: keras.layers.Layer, origin: keras.layers.Layer) -> list[tuple[Any, Any]] | None:
    """A copy's variables with the original's; None where they differ.

    By name, or where Keras numbers layers that have no name of their own anew ("dense_5/kernel" for "dense/kernel") by
    their places: a layer's own ones in order, then those of the layers in it.
    """
    new, old = variables_of(twin), variables_of(origin)
    if new.keys() == old.keys():
        pairs = [(new[key], old[key]) for key in old]
    else:
        known = {id(v) for v in (*new.values(), *old.values())}
        pairs = [(a, b) for a, b in _placed(twin, origin).values() if id(a) in known and id(b) in known]
        if not len(pairs) == len({id(a) for a, _ in pairs}) == len(new) == len(old):
            return None
    alike = (_plain(a.name) == _plain(b.name) and tuple(a.shape) == tuple(b.shape) for a, b in pairs)
    return pairs if all(alike) else None


def _plain(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _placed(twin: keras.layers.Layer, origin: keras.layers.Layer) -> dict[int, tuple[Any, Any]]:
    found: dict[int, tuple[Any, Any]] = {}
    for kind in ("_trainable_variables", "_non_trainable_variables"):
        pairs = zip(getattr(twin, kind), getattr(origin, kind), strict=False)
        found.update({id(a): (a, b) for a, b in pairs})
    for mine, theirs in zip(twin._layers, origin._layers, strict=False):
        found = {**_placed(mine, theirs), **found}
    return found
