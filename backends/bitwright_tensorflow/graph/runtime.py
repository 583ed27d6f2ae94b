"""Running graphs: import into a `tf.Graph`, set the variables, call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.core.framework.graph_pb2 import GraphDef

from bitwright.errors import InputError, ModelError

VARIABLES = frozenset({"VarHandleOp", "VariableV2", "Variable"})
"""Ops that hold a variable."""

FED_BYTES = 2**24
"""Values of variables that are set at once."""

Array = NDArray[Any]


def session_config() -> tf.compat.v1.ConfigProto:
    """Ops as they stand in the graph; threads from BITWRIGHT_THREADS or OMP_NUM_THREADS, else TensorFlow's default.

    Grappler's remapper, which fuses a convolution with what follows it, is off: its fused kernels refuse groups and
    some activations (`FusedBatchNorm,Tanh`), and with oneDNN it loses tensors that are fetched.

    Raises:
        InputError: the variable isn't a whole number ≥ 0.
    """
    config = tf.compat.v1.ConfigProto()
    for variable in ("BITWRIGHT_THREADS", "OMP_NUM_THREADS"):
        if text := os.environ.get(variable):
            if not text.isdigit():
                raise InputError(f"{variable}={text!r} is not a number of threads; set it to 1, 2, … or unset it")
            config.intra_op_parallelism_threads = int(text)
            config.inter_op_parallelism_threads = 1
            break
    config.allow_soft_placement = True
    rewriting = config.graph_options.rewrite_options
    rewriting.remapping = rewriting.OFF
    return config


def import_graph(graph_def: GraphDef) -> tf.Graph:
    """A new graph of these nodes, under their own names.

    Raises:
        ModelError: TensorFlow refuses the graph.
    """
    graph = tf.Graph()
    try:
        with graph.as_default():
            tf.import_graph_def(graph_def, name="")
    except (ValueError, tf.errors.OpError) as error:
        raise ModelError(f"TensorFlow refuses the graph: {reason(error)}") from error
    return graph


def import_values(session: tf.compat.v1.Session, values: Mapping[str, Any]) -> None:
    """Set variables of a session's graph by node name; names that the graph lacks are passed over."""
    graph = session.graph
    known = {op.name: op for op in graph.get_operations() if op.type in VARIABLES and op.name in values}
    with graph.as_default(), graph.control_dependencies(None):
        for names in set_together(known, values):
            assigned, feed = [], {}
            for name in names:
                op, array = known[name], np.asarray(values[name])
                dtype = tf.as_dtype(op.get_attr("dtype")).base_dtype
                given = tf.compat.v1.placeholder(dtype, array.shape, name="bitwright/value")
                feed[given] = array
                if op.type == "VarHandleOp":
                    assigned.append(tf.raw_ops.AssignVariableOp(resource=op.outputs[0], value=given))
                else:
                    assigned.append(tf.compat.v1.assign(op.outputs[0], given, validate_shape=False).op)
            session.run(assigned, feed)


def set_together(names: Iterable[str], values: Mapping[str, Any]) -> Iterator[list[str]]:
    """Variables whose values are set at once: TensorFlow copies what it is fed, and some are computed when they are.

    Args:
        names: of the variables.
        values: theirs.
    """
    found: list[str] = []
    size = 0
    for name in names:
        added = getattr(values[name], "nbytes", 0)
        if found and size + added > FED_BYTES:
            yield found
            found, size = [], 0
        found.append(name)
        size += added
    if found:
        yield found


def open_graph(graph_def: GraphDef, values: Mapping[str, Any], made: Callable[..., Any] = tf.compat.v1.Session) -> Any:
    """A session on a new graph of these nodes, with its variables set; `made` is its class."""
    graph = import_graph(graph_def)
    session = made(graph=graph, config=session_config())
    import_values(session, values)
    return session


_TRACES = ("Graph execution error", "Detected at node", "Defined at", "Node:")


def reason(error: BaseException) -> str:
    """What TensorFlow's message says, in one line."""
    text = str(getattr(error, "message", "") or error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(_TRACES)]
    return (told or lines)[0][:400]
