"""The calls that Keras recorded: of a functional model, or of any layer whose `call` takes symbolic tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from bitwright.backend import user_state_kept
from bitwright.errors import ModelError
from bitwright_keras.capture.training_mode import takes_training
from bitwright_keras.graph.native import first_line


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded call.

    Attributes:
        operation: the user's layer or operation.
        index: which of its calls in the recording this is, in the order in which they were made.
        args, kwargs: nested arguments, with the recording's KerasTensors.
        outputs: the KerasTensors that it returned, flat.
    """

    operation: keras.Operation
    index: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Recording:
    """What a function does, as calls in topological order.

    Attributes:
        inputs: flat KerasTensors.
        inputs_structure: of the function's argument.
        calls: those that the outputs depend on.
        outputs: the structure of KerasTensors that it returns.
        replayed: of a functional model, which passes the `training` that it is called with to all of its layers.
            In other recordings each call holds its own.
    """

    inputs: tuple[Any, ...]
    inputs_structure: Any
    calls: tuple[Call, ...]
    outputs: Any
    replayed: bool = True


def recorded(function: Any) -> Recording:
    """The recording of a functional model or `keras.Function`."""
    calls: list[Call] = []
    order = function._nodes_by_depth
    present = {id(node) for nodes in order.values() for node in nodes}
    for depth in sorted(order, reverse=True):
        for node in order[depth]:
            if node.operation is None or node.is_input or isinstance(node.operation, keras.layers.InputLayer):
                continue
            made = [n for n in node.operation._inbound_nodes if id(n) in present]
            index = next(i for i, n in enumerate(made) if n is node)
            arguments = node.arguments
            calls.append(Call(node.operation, index, arguments.args, arguments.kwargs, tuple(node.outputs)))
    return Recording(tuple(function._inputs), function._inputs_struct, tuple(calls), function._outputs_struct)


def functional_of(model: keras.Model) -> Any | None:
    """The functional model that a model is, or holds (Sequential); None for those that have a `call` of their own."""
    if not str(getattr(type(model).call, "__module__", "")).startswith("keras."):
        return None
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def trace(
    layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool = False
) -> Recording:
    """Record what a layer's or subclassed model's `call` does, by calling it on fresh symbolic tensors.

    The layers that it calls keep no trace of it. As in any call, they take over its `training` unless they are given
    another one.

    Args:
        layer: built.
        args, kwargs: with KerasTensors; only their shapes and types are used.
        training: that the layer is called with, or that was in force where it is called.

    Raises:
        ModelError: `call` can't be recorded.
    """
    recording = _record(layer, args, kwargs, training)
    held = _constants(recording)
    again = _constants(_record(layer, args, kwargs, training)) if held else held
    if len(held) != len(again) or any(not np.array_equal(a, b) for a, b in zip(held, again, strict=True)):
        raise _refused(layer, "it draws other numbers at each call")
    return recording


def _record(
    layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool
) -> Recording:  # fmt: skip
    fresh: list[Any] = []

    def stand_in(x: Any) -> Any:
        if not isinstance(x, keras.KerasTensor):
            return x
        fresh.append(keras.KerasTensor(x.shape, dtype=x.dtype, name=x.name))
        return fresh[-1]

    new_args, new_kwargs = keras.tree.map_structure(stand_in, (args, dict(kwargs)))
    called_with = {**new_kwargs, "training": training} if takes_training(layer) else new_kwargs
    inside = [x for x in layer._flatten_layers() if x is not layer]
    before = {id(x): (x, len(x._inbound_nodes), len(x._outbound_nodes)) for x in inside}
    context = layer._get_call_context()
    context.training = training
    try:
        with user_state_kept(layer, holders=(keras.Operation,)):
            outputs = layer.call(*new_args, **called_with)
            leaves = keras.tree.flatten(outputs)
            if not leaves or not all(isinstance(x, keras.KerasTensor) for x in leaves):
                raise ModelError("it returns what is not a tensor")
            layer._maybe_reset_call_context()
            recording = recorded(keras.Function(fresh, outputs))
    except Exception as error:
        raise _refused(layer, first_line(error)) from error
    finally:
        layer._maybe_reset_call_context()
        for inner, inbound, outbound in before.values():
            del inner._inbound_nodes[inbound:]
            del inner._outbound_nodes[outbound:]
    return Recording(tuple(fresh), (new_args, new_kwargs), recording.calls, recording.outputs, False)


def _refused(layer: keras.layers.Layer, why: str) -> ModelError:
    return ModelError(
        f"layer {layer.name!r} ({type(layer).__name__}) can't be captured through its call(): {why}; compute with "
        "keras.layers and keras.ops only, and don't branch on values or on free dimensions"
    )


def _constants(recording: Recording) -> list[Any]:
    """Tensors among the arguments of calls that nothing in the recording computes."""
    found = keras.tree.flatten([(call.args, dict(call.kwargs)) for call in recording.calls])
    return [
        keras.ops.convert_to_numpy(x)
        for x in found
        if not isinstance(x, keras.KerasTensor | keras.Variable) and keras.ops.is_tensor(x)
    ]


def history(tensor: Any) -> Call | None:
    """The call that computed a KerasTensor; None for one that nothing computed."""
    found = getattr(tensor, "_keras_history", None)
    if found is None or found.operation is None or isinstance(found.operation, keras.layers.InputLayer):
        return None
    node = found.operation._inbound_nodes[found.node_index]
    return Call(found.operation, 0, node.arguments.args, node.arguments.kwargs, tuple(node.outputs))
