"""`KerasModel`: a Keras model in normal form, as a list of calls of layers and `keras.ops` operations.

In normal form every call does one canonical thing: nested models are inlined, activations given as arguments are
calls of their own, a separable convolution is a depthwise and a pointwise one, attention is matrix products and a
softmax (see `normalize`). `native.keras_model` makes a plain `keras.Model` of it.

A `KerasModel` never changes: edits make new ones, which share the layers that they leave alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import keras

from bitwright.errors import ModelError
from bitwright.graph import OpId, ParamId, TensorId


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for an activation in a call's arguments and in a model's outputs."""

    id: TensorId


@dataclass(frozen=True, slots=True)
class Spec:
    """What is known of an activation; None for free dimensions."""

    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Node:
    """One call of a layer or operation.

    Attributes:
        op: id of the op; the user's name for it. A layer that is called twice gives "name" and "name_1".
        operation: the layer or `keras.ops` operation. Its own name is the one that it has in files: Keras allows no
            "/" there, so "block/conv" is "block_conv".
        args, kwargs: nested arguments, `Ref` in place of tensors; constants are numbers and numpy arrays.
        outputs: ids of the activations that it computes.
        params: parameter id by key: the variable's path below the layer ("kernel", "moving_mean"); for a constant
            operand, "args/0" or "kwargs/x2".
    """

    op: OpId
    operation: keras.Operation
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[TensorId, ...]
    params: Mapping[str, ParamId] = field(default_factory=dict)

    @property
    def layer(self) -> keras.layers.Layer | None:
        """The operation, if it is a layer."""
        return self.operation if isinstance(self.operation, keras.layers.Layer) else None

    @property
    def type(self) -> str:
        """The operation's class."""
        return type(self.operation).__name__

    @cached_property
    def inputs(self) -> tuple[TensorId, ...]:
        """Activations among the arguments, in order, repeated ones repeated."""
        return tuple(refs((self.args, self.kwargs)))

    def filled(self, values: Mapping[TensorId, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with values in place of the `Ref`s."""
        if len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Ref):
            return (values[self.args[0].id],), {}
        args, kwargs = substitute((self.args, dict(self.kwargs)), lambda ref: values[ref.id])
        return args, kwargs

    def rewired(self, tensors: Mapping[TensorId, TensorId]) -> Node:
        """The call with other activations as arguments."""
        if not any(t in tensors for t in self.inputs):
            return self
        args, kwargs = substitute((self.args, dict(self.kwargs)), lambda ref: Ref(tensors.get(ref.id, ref.id)))
        return replace(self, args=args, kwargs=kwargs)


@dataclass(frozen=True, eq=False)
class KerasModel:
    """A model that the backend works on.

    Attributes:
        name: the user's.
        inputs: ids of the input tensors, in order; the names of the input layers.
        call: the structure in which the user's model takes them (a `Ref`, or a list or dict of such).
        nodes: calls in topological order.
        outputs: the structure in which the user's model returns its outputs.
        specs: shape and dtype of each activation.
    """

    name: str
    inputs: tuple[TensorId, ...]
    call: Any
    nodes: tuple[Node, ...]
    outputs: Any
    specs: Mapping[TensorId, Spec]
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def output_ids(self) -> tuple[TensorId, ...]:
        """Output activations in order, each once."""
        return tuple(dict.fromkeys(refs(self.outputs)))

    @cached_property
    def producers(self) -> Mapping[TensorId, Node]:
        """The call that computes each activation; model inputs have none."""
        return {t: node for node in self.nodes for t in node.outputs}

    @cached_property
    def by_op(self) -> Mapping[OpId, Node]:
        """Calls by op id."""
        return {node.op: node for node in self.nodes}

    @cached_property
    def calls_of(self) -> Mapping[int, tuple[Node, ...]]:
        """The calls of each layer, by `id(layer)`; several where it is shared."""
        found: dict[int, list[Node]] = {}
        for node in self.nodes:
            found.setdefault(id(node.operation), []).append(node)
        return {key: tuple(nodes) for key, nodes in found.items()}

    def node(self, op: OpId) -> Node:
        """The call of that op id.

        Raises:
            ModelError: there is none.
        """
        try:
            return self.by_op[op]
        except KeyError:
            raise ModelError(f"the model has no op {op!r}") from None

    def with_(self, **changes: Any) -> KerasModel:
        """The model with other calls or outputs."""
        return replace(self, **{"memo": {}, **changes})

    @property
    def layers(self) -> Iterator[keras.layers.Layer]:
        """Every layer once, in order of its first call."""
        seen: set[int] = set()
        for node in self.nodes:
            if node.layer is not None and id(node.layer) not in seen:
                seen.add(id(node.layer))
                yield node.layer


def refs(structure: Any) -> Iterator[TensorId]:
    """Activations in a nested structure, in order."""
    for leaf in keras.tree.flatten(structure):
        if isinstance(leaf, Ref):
            yield leaf.id


def substitute(structure: Any, value: Any) -> Any:
    """A nested structure with `value(ref)` in place of each `Ref`."""
    return keras.tree.map_structure(lambda x: value(x) if isinstance(x, Ref) else x, structure)


def execute(nodes: Iterable[Node], values: dict[TensorId, Any]) -> None:
    """Call nodes in order, on tensors or on KerasTensors; each result is added to `values`."""
    for node in nodes:
        args, kwargs = node.filled(values)
        results = keras.tree.flatten(node.operation(*args, **kwargs))
        values.update(zip(node.outputs, results, strict=True))


def pruned(nodes: Iterable[Node], wanted: Iterable[TensorId]) -> tuple[Node, ...]:
    """The nodes that some wanted activation depends on."""
    needed, kept = set(wanted), []
    for node in reversed(list(nodes)):
        if not needed.isdisjoint(node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    return tuple(reversed(kept))


def variables_of(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Variables of a layer by their path below it: "kernel", "forward_lstm/lstm_cell/kernel".

    Random-number states are left out.
    """
    found: dict[str, keras.Variable] = {}
    for variable in layer.variables:
        if str(variable.dtype).startswith(("uint", "string")) or "seed_generator" in variable.path:
            continue
        key = variable.path.rpartition(f"{layer.name}/")[2] or variable.name
        while key in found:
            key += "_"
        found[key] = variable
    return found
