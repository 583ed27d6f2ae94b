"""The calls that Keras recorded: of a functional model, or of any layer whose `call` takes symbolic tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from bitwright.errors import ModelError


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
    """

    inputs: tuple[Any, ...]
    inputs_structure: Any
    calls: tuple[Call, ...]
    outputs: Any


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
    """The functional model that a model is, or holds (Sequential); None for subclassed ones."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def trace(layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Recording:
    """Record what a layer's or subclassed model's `call` does, by calling it on fresh symbolic tensors.

    The layers that it calls keep no trace of it.

    Args:
        layer: built.
        args, kwargs: with KerasTensors; only their shapes and types are used.

    Raises:
        ModelError: `call` can't be recorded.
    """
    fresh: list[Any] = []

    def stand_in(x: Any) -> Any:
        if not isinstance(x, keras.KerasTensor):
            return x
        fresh.append(keras.KerasTensor(x.shape, dtype=x.dtype, name=x.name))
        return fresh[-1]

    new_args, new_kwargs = keras.tree.map_structure(stand_in, (args, dict(kwargs)))
    inside = [x for x in layer._flatten_layers() if x is not layer]
    before = {id(x): (x, len(x._inbound_nodes), len(x._outbound_nodes)) for x in inside}
    try:
        outputs = layer.call(*new_args, **new_kwargs)
        leaves = keras.tree.flatten(outputs)
        if not leaves or not all(isinstance(x, keras.KerasTensor) for x in leaves):
            raise ModelError("it returns what is no tensor")
        recording = recorded(keras.Function(fresh, outputs))
    except Exception as error:
        raise ModelError(
            f"layer {layer.name!r} ({type(layer).__name__}) can't be captured through its call(): "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}; compute with "
            "keras.layers and keras.ops only, and don't branch on values or on free dimensions"
        ) from error
    finally:
        for inner, inbound, outbound in before.values():
            del inner._inbound_nodes[inbound:]
            del inner._outbound_nodes[outbound:]
    return Recording(tuple(fresh), (new_args, new_kwargs), recording.calls, recording.outputs)


def history(tensor: Any) -> Call | None:
    """The call that computed a KerasTensor; None for one that nothing computed."""
    found = getattr(tensor, "_keras_history", None)
    if found is None or found.operation is None or isinstance(found.operation, keras.layers.InputLayer):
        return None
    node = found.operation._inbound_nodes[found.node_index]
    return Call(found.operation, 0, node.arguments.args, node.arguments.kwargs, tuple(node.outputs))
