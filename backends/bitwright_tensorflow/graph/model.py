"""`TfModel`: a TensorFlow graph with the values of its variables, as bitwright works on it.

What simulation and export can rely on:

- `meta` is a whole `MetaGraphDef`: inference nodes, and for sessions everything else that the user's graph holds
  (optimizers, savers, control-flow frames, collections, functions), untouched. Nothing writes to it after opening:
  take `copy_meta` and change that. Function calls between inputs and outputs are inlined, so that every
  op of the network is a node of `meta.graph_def`.
- `values` has one array for each variable node (`VarHandleOp`, `VariableV2`), by node name, in the variable's own
  layout. A frozen source has `Const` nodes and no values.
- Tensors are called as TensorFlow does, "conv/Relu:0"; ids of ops are node names ("conv/Conv2D": the product of a
  convolution with its BiasAdd); ids of parameters are the node names of variables or constants ("conv/kernel").
- `open_session(model)` imports the graph and sets the variables; `runtime.import_values(…)` does so for a
  rewritten GraphDef. `canonical.recognize(model)` says which nodes each canonical op consists of, and at which
  (node, operand) a parameter is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef

from bitwright.errors import InputError, ModelError
from bitwright.graph import TensorId
from bitwright_tensorflow.graph.runtime import VARIABLES, Array, import_values, open_graph, reason, session_config

__all__ = ["VARIABLES", "Array", "GraphDef", "Kind", "MetaGraphDef", "NodeDef", "Signature", "TfModel", "array_of",
           "node_of", "open_session", "operand_of", "tensor_id"]  # fmt: skip


class Kind(StrEnum):
    """Where a model came from, and so in which form it goes back to the user."""

    SESSION = "session"
    SAVED_MODEL = "saved_model"
    FUNCTION = "function"
    FROZEN = "frozen"


@dataclass(frozen=True)
class Signature:
    """How the user calls the model: argument and result names → tensors, in order.

    Attributes:
        inputs: argument name → tensor.
        outputs: result name → tensor.
        key: the SignatureDef's name in a SavedModel.
    """

    inputs: Mapping[str, TensorId]
    outputs: Mapping[str, TensorId]
    key: str = "serving_default"


@dataclass(frozen=True, eq=False)
class TfModel:
    """A graph, what its variables hold, and which tensors are its inputs and outputs. Immutable.

    Attributes:
        meta: the graph and its collections.
        values: contents of the variables by node name.
        inputs: tensors that are fed, in order.
        outputs: tensors that the model computes, in order.
        kind: where it came from.
        signature: the user's names of inputs and outputs.
        memo: what was worked out about the graph (recognition, shapes); never part of the model's meaning.
    """

    meta: MetaGraphDef
    values: Mapping[str, Array]
    inputs: tuple[TensorId, ...]
    outputs: tuple[TensorId, ...]
    kind: Kind
    signature: Signature
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def graph_def(self) -> GraphDef:
        """The nodes. Not to be written to."""
        return self.meta.graph_def

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the variable nodes."""
        return tuple(node.name for node in self.graph_def.node if node.op in VARIABLES)

    def copy_meta(self) -> MetaGraphDef:
        """A graph of one's own, to be changed."""
        copied = MetaGraphDef()
        copied.CopyFrom(self.meta)
        return copied

    def with_values(self, values: Mapping[str, Array]) -> TfModel:
        """The same graph with other contents of some variables."""
        # What was worked out about the graph still holds; an open session has the old values.
        memo = {key: value for key, value in self.memo.items() if key != "session"}
        return replace(self, values={**self.values, **values}, memo=memo)

    def with_meta(self, meta: MetaGraphDef, values: Mapping[str, Array] | None = None) -> TfModel:
        """Another graph of the same inputs and outputs."""
        return replace(self, meta=meta, values=dict(self.values if values is None else values), memo={})

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run it on arrays: by position, or by argument or tensor name.

        Returns:
            One array, or a dictionary by result name where there are several.

        Raises:
            InputError: an argument is missing or unknown.
        """
        by_name = dict(self.signature.inputs)
        if len(arguments) > len(self.inputs):
            raise InputError(f"the model takes {len(self.inputs)} inputs, {len(arguments)} are given")
        feed = dict(zip(self.inputs, arguments, strict=False))
        for name, value in named.items():
            tensor = by_name.get(name, tensor_id(name))
            if tensor not in self.inputs:
                raise InputError(f"the model has no input {name!r}; it takes {', '.join(by_name) or self.inputs}")
            feed[tensor] = value
        if missing := [t for t in self.inputs if t not in feed]:
            raise InputError(f"no array for input {missing[0]!r}")
        session = self.memo.get("session")
        if session is None:
            session = self.memo["session"] = open_session(self)
        results = session.run(list(self.signature.outputs.values()), feed)
        return results[0] if len(results) == 1 else dict(zip(self.signature.outputs, results, strict=True))


def open_session(model: TfModel, made: Callable[..., Any] = tf.compat.v1.Session) -> Any:
    """The whole model in a session: for a `Kind.SESSION` with its collections, so that savers and optimizers work.

    Lookup tables are initialized. The caller closes the session, whose class is `made`.

    Raises:
        ModelError: TensorFlow refuses the graph.
    """
    if model.kind is not Kind.SESSION:
        return open_graph(model.graph_def, model.values, made)
    graph = tf.Graph()
    try:
        with graph.as_default():
            tf.compat.v1.train.import_meta_graph(model.copy_meta(), clear_devices=True)
    except (ValueError, tf.errors.OpError) as error:
        raise ModelError(f"TensorFlow refuses the graph: {reason(error)}") from error
    session = made(graph=graph, config=session_config())
    import_values(session, model.values)
    tables = graph.get_collection(tf.compat.v1.GraphKeys.TABLE_INITIALIZERS)
    if tables:
        session.run(tables)
    return session


def node_of(tensor: str) -> str:
    """The node that a tensor or an operand comes from: "a" of "a:1", "^a" and "a"."""
    return tensor.lstrip("^").partition(":")[0]


def tensor_id(operand: str) -> TensorId:
    """The tensor's name: "a:0" of an operand written "a"."""
    return operand if ":" in operand else f"{operand}:0"


def operand_of(tensor: TensorId) -> str:
    """How NodeDefs write it: "a" of "a:0", "a:1" as it is."""
    return tensor.removesuffix(":0")


def array_of(tensor_proto: Any) -> Array:
    """The values of a TensorProto.

    Raises:
        ModelError: it holds another number of values than its shape says, or none of a type that arrays have.
    """
    try:
        return np.asarray(tf.make_ndarray(tensor_proto))
    except (TypeError, ValueError) as error:
        raise ModelError(f"a constant of the graph can't be read, the file is damaged: {error}") from error
