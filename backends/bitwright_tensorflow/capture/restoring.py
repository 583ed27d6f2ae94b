"""Contents of variables: of a session's, and of those that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from bitwright.errors import ModelError
from bitwright_tensorflow.capture.trust import only_initializes, only_restores
from bitwright_tensorflow.graph.model import VARIABLES, Array, MetaGraphDef
from bitwright_tensorflow.graph.runtime import reason


def session_values(session: Any, chosen: Collection[str] | None = None) -> dict[str, Array]:
    """Contents of all variables (or of some) that are initialized, read by nodes that the graph has already."""
    fetches: dict[str, Any] = {}
    for op in session.graph.get_operations():
        if op.type == "VarHandleOp":
            reads = [r for r in op.outputs[0].consumers() if r.type == "ReadVariableOp" and not r.control_inputs]
            if reads:
                # Reads of gradients and optimizers may depend on the data.
                fetches[op.name] = reads[0].outputs[0]
        elif op.type in VARIABLES:
            fetches[op.name] = op.outputs[0]
    if chosen is not None:
        fetches = {name: fetch for name, fetch in fetches.items() if name in chosen}
    try:
        return {name: np.asarray(v) for name, v in session.run(fetches).items()}
    except tf.errors.OpError:
        values: dict[str, Array] = {}
        for name, fetch in fetches.items():
            try:
                values[name] = np.asarray(session.run(fetch))
            except tf.errors.OpError as error:
                raise ModelError(
                    f"variable {name!r} can't be read: {reason(error)}; initialize or restore it"
                ) from error
        return values


def has_checkpoint(prefix: str) -> bool:
    """Whether there is a checkpoint of this name, of TensorFlow's second or first format."""
    return Path(f"{prefix}.index").is_file() or Path(prefix).is_file()


def restored(meta: MetaGraphDef, prefix: str) -> dict[str, Array]:
    """Contents of the variables by the checkpoint: under a variable's name, or as the graph's saver restores them.

    Variables that the checkpoint lacks (an optimizer's, where only weights were saved) have their initial values.

    Raises:
        ModelError: the checkpoint lacks a variable that has no initial value either, or restoring it would run other
            ops than those that read checkpoints.
    """
    reader = tf.train.load_checkpoint(prefix)
    saved = reader.get_variable_to_shape_map()
    nodes = [node for node in meta.graph_def.node if node.op in VARIABLES]
    if all(node.name in saved for node in nodes):
        return {node.name: np.asarray(reader.get_tensor(node.name)) for node in nodes}
    initializers = _initializers(meta)
    missing = [n.name for n in nodes if n.name not in saved]
    if not meta.HasField("saver_def") and (lost := [n for n in missing if n not in initializers]):
        raise ModelError(f"the checkpoint {prefix} has no variable {lost[0]!r}")
    if meta.HasField("saver_def") and (other := only_restores(meta.graph_def, meta.saver_def.restore_op_name)):
        raise ModelError(f"restoring the checkpoint {prefix} would run a {other}, so it isn't opened")
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        try:
            saver = tf.compat.v1.train.import_meta_graph(meta, clear_devices=True)
            session.run([initializers[n] for n in missing if n in initializers])
            if saver is not None:
                saver.restore(session, prefix)
        except (tf.errors.OpError, ValueError) as error:
            raise ModelError(f"the checkpoint {prefix} can't be restored: {reason(error)}") from error
        values = session_values(session, missing if saver is None else None)
    return {n.name: values[n.name] if n.name in values else np.asarray(reader.get_tensor(n.name)) for n in nodes}


def _initializers(meta: MetaGraphDef) -> dict[str, str]:
    """Variable → the op that gives it its initial value, of those that compute numbers and nothing else."""
    from tensorflow.core.framework.variable_pb2 import VariableDef

    found: dict[str, str] = {}
    for collection in meta.collection_def.values():
        for item in collection.bytes_list.value:
            record = VariableDef()
            try:
                record.ParseFromString(item)
            except DecodeError:
                continue
            name = record.variable_name.partition(":")[0]
            initializer = record.initializer_name.partition(":")[0]
            if initializer and name not in found and only_initializes(meta.graph_def, initializer):
                found[name] = initializer
    return found
