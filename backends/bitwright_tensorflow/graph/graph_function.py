"""A graph as a callable for eager code, with `tf.Variable`s for its variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.errors import InputError, ModelError
from bitwright.graph import TensorId
from bitwright_tensorflow.graph.model import VARIABLES, Array, MetaGraphDef, Signature, tensor_id
from bitwright_tensorflow.graph.runtime import reason

v1 = tf.compat.v1


class GraphFunction:
    """A graph as a callable for eager code and `tf.GradientTape`.

    Attributes:
        variables, trainable_variables: `tf.Variable`s, under their names in the graph.
        concrete: the `ConcreteFunction`; its inputs are in the order of the model's.
    """

    def __init__(
        self,
        meta: MetaGraphDef,
        values: Mapping[str, Array],
        inputs: Sequence[TensorId],
        outputs: Mapping[str, TensorId],
        signature: Signature,
    ) -> None:
        references = [n.name for n in meta.graph_def.node if n.op in VARIABLES and n.op != "VarHandleOp"]
        if references:
            raise ModelError(
                f"{references[0]!r} is a reference variable, which functions can't have: evaluate and train in the "
                "session, or build the graph with resource variables (tf.compat.v1.enable_resource_variables())"
            )
        self._inputs, self._signature = tuple(inputs), signature
        self._whole = v1.wrap_function(lambda: import_meta(meta), signature=[])
        graph = self._whole.graph
        self._by_name = {v.name.partition(":")[0]: v for v in self._whole.variables}
        self.assign(values)
        tables = graph.get_collection(v1.GraphKeys.TABLE_INITIALIZERS)
        if tables:
            self._whole.prune([], tables)()
        feeds = [graph.get_tensor_by_name(t) for t in inputs]
        self.concrete = self._whole.prune(feeds, {n: graph.get_tensor_by_name(t) for n, t in outputs.items()})

    @property
    def variables(self) -> tuple[Any, ...]:
        """All variables."""
        return tuple(self._by_name.values())

    @property
    def trainable_variables(self) -> tuple[Any, ...]:
        """Those to train: the user's own, and learned scales."""
        return tuple(v for v in self._by_name.values() if v.trainable)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Tensors for tensors, by position or by name; one, or a dictionary where there are several outputs."""
        feed = feed_of(named_arguments(arguments, named, self._inputs), self._inputs, self._signature)
        graph = self._whole.graph
        given = [tf.convert_to_tensor(feed[t], graph.get_tensor_by_name(t).dtype) for t in self._inputs]
        results = self.concrete(*given)
        return next(iter(results.values())) if len(results) == 1 else results

    def assign(self, values: Mapping[str, Array]) -> None:
        """Set variables by node name; others are passed over."""
        for name, value in values.items():
            if name in self._by_name:
                self._by_name[name].assign(value)

    def read(self, names: Sequence[str]) -> dict[str, Array]:
        """Present values, by node name."""
        return {n: self._by_name[n].numpy() for n in names if n in self._by_name}

    def fetch(self, tensors: Sequence[TensorId]) -> list[Array]:
        """Tensors that depend on variables alone."""
        graph = self._whole.graph
        found = self._whole.prune([], [graph.get_tensor_by_name(t) for t in tensors])()
        return [np.asarray(v) for v in found]


def import_meta(meta: MetaGraphDef) -> None:
    """Import a graph and its collections into the default graph.

    Raises:
        ModelError: TensorFlow refuses it.
    """
    copied = MetaGraphDef()
    copied.CopyFrom(meta)
    try:
        v1.train.import_meta_graph(copied, clear_devices=True)
    except (ValueError, tf.errors.OpError) as error:
        raise ModelError(f"TensorFlow refuses the graph: {reason(error)}") from error


def named_arguments(arguments: Sequence[Any], named: Mapping[str, Any], inputs: Sequence[TensorId]) -> dict[str, Any]:
    """Arguments by position and by name, all by name.

    Raises:
        InputError: there are too many.
    """
    if len(arguments) > len(inputs):
        raise InputError(f"the model takes {len(inputs)} inputs, {len(arguments)} are given")
    return {**dict(zip(inputs, arguments, strict=False)), **named}


def feed_of(batch: Mapping[str, Any], inputs: Sequence[TensorId], signature: Signature) -> dict[TensorId, Any]:
    """Inputs by tensor, from a batch by tensor or argument name.

    Raises:
        InputError: one is missing or unknown.
    """
    feed: dict[TensorId, Any] = {}
    for name, value in batch.items():
        tensor = signature.inputs.get(name, tensor_id(name))
        if tensor not in inputs:
            raise InputError(f"the model has no input {name!r}; it takes {', '.join(signature.inputs) or inputs}")
        feed[tensor] = value
    if missing := [t for t in inputs if t not in feed]:
        raise InputError(f"no array for input {missing[0]!r}")
    return feed
