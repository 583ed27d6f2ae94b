"""What was captured against what the user holds, on one batch: no wrong float model gets further than this.

Only what computes and nothing else is run: a function that assigns variables, draws random numbers or reaches outside
of its graph is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.backend import Fault, Finding, Run, compare_capture, user_state_kept
from bitwright.graph import Graph
from bitwright_tensorflow.capture.trust import closure
from bitwright_tensorflow.graph.canonical import recognize
from bitwright_tensorflow.graph.model import VARIABLES, Array, NodeDef, TfModel, open_session

_HARMLESS = VARIABLES | {
    "Assert", "Case", "If", "LookupTableFindV2", "PartitionedCall", "ReadVariableOp", "ResourceGather",
    "ResourceGatherNd", "StatefulPartitionedCall", "While",
}  # fmt: skip
"""Ops that TensorFlow calls stateful, which change nothing."""


def compare(model: TfModel, run: Run, sample: Sequence[Any] | None = None) -> Finding | None:
    """Whether a capture computes what the user's function or session does.

    Args:
        model: what was captured.
        run: the user's own, on arrays in the order of the model's inputs; results in the order of its signature.
        sample: one batch in that order; without one, numbers are made up (which needn't suit the model: then nothing
            is compared).
    """
    graph, outputs = recognize(model).graph, model.signature.outputs
    specs = [(graph.tensors[t].shape or (), graph.tensors[t].dtype) for t in model.inputs]
    if (len(sample) != len(specs)) if sample is not None else not _plain(model, graph):
        return None

    given = None if sample is None else [np.asarray(x) for x in sample]
    dtypes = {graph.tensors[t].dtype for t in (*model.inputs, *outputs.values()) if t in graph.tensors}

    def fed(batch: Sequence[Any]) -> list[Array]:
        return [np.asarray(x, None if given else dtype) for x, (_, dtype) in zip(batch, specs, strict=True)]

    with closing(open_session(model)) as session:  # which isn't entered: its graph would be the user's code's

        def captured(batch: Sequence[Any]) -> list[Array]:
            found = session.run(dict(outputs), dict(zip(model.inputs, fed(batch), strict=True)))
            return [np.asarray(found[name]) for name in outputs]

        own = [*outputs]
        finding = compare_capture(lambda x: run(fed(x)), captured, specs, given, dtypes=dtypes, names=own)
    return None if finding is not None and finding.fault is Fault.UNCHECKED else finding


def of_function(function: Any, model: TfModel, sample: Any = None, *, called: Any = None) -> Finding | None:
    """Compare a concrete function with its capture (see `compare`).

    Args:
        function: the user's.
        model: what it was captured as.
        sample: what it was traced with: an array, a tuple, or a mapping by argument name.
        called: what the user calls, if it isn't the function itself but what that was traced from.
    """
    graph_def = function.graph.as_graph_def()
    if not only_computes([*graph_def.node, *(n for f in graph_def.library.function for n in f.node_def)]):
        return None
    given = function.structured_input_signature
    leaves = [x for x in tf.nest.flatten(given) if isinstance(x, tf.TensorSpec)]
    if len(leaves) != len(model.inputs):
        return None

    def run(arrays: Sequence[Array]) -> list[Any]:
        fed = iter(tf.constant(a, spec.dtype) for a, spec in zip(arrays, leaves, strict=True))
        args, kwargs = tf.nest.map_structure(lambda x: next(fed) if isinstance(x, tf.TensorSpec) else x, given)
        results = tf.nest.flatten((function if called is None else called)(*args, **kwargs))
        return [tf.convert_to_tensor(x).numpy() for x in results]

    with user_state_kept(called, holders=(tf.Module,)):
        return compare(model, run, None if sample is None else _in_order(sample, given))


def _in_order(sample: Any, given: Any) -> list[Any] | None:
    """A sample's arrays in the order of a function's arguments."""
    if isinstance(sample, Mapping):
        names = [spec.name for spec in tf.nest.flatten(given) if isinstance(spec, tf.TensorSpec)]
        return [sample[n] for n in names] if set(names) == set(sample) else None
    return list(sample) if isinstance(sample, tuple | list) else [sample]


def of_session(session: Any, model: TfModel, constants: Mapping[str, Any]) -> Finding | None:
    """Compare a session with its capture (see `compare`).

    Args:
        session: the user's.
        model: what it was captured as.
        constants: placeholders that are fed what inference takes.
    """
    if not only_computes(closure(session.graph.as_graph_def(), model.signature.outputs.values())):
        return None
    fixed = {session.graph.get_tensor_by_name(f"{str(n).partition(':')[0]}:0"): v for n, v in constants.items()}

    def run(arrays: Sequence[Array]) -> list[Any]:
        fed = {session.graph.get_tensor_by_name(t): a for t, a in zip(model.inputs, arrays, strict=True)}
        found = session.run(dict(model.signature.outputs), {**fixed, **fed})
        return [np.asarray(found[name]) for name in model.signature.outputs]

    return compare(model, run)


def only_computes(nodes: Iterable[NodeDef]) -> bool:
    """Whether running the nodes changes nothing and gives the same each time."""
    from tensorflow.python.framework import op_def_registry

    for node in nodes:
        known = op_def_registry.get(node.op)
        if known is not None and known.is_stateful and node.op not in _HARMLESS:
            return False
    return True


def _plain(model: TfModel, graph: Graph) -> bool:
    """Whether numbers can be made up for all inputs."""
    if any(graph.tensors[t].shape is None for t in model.inputs):
        return False
    try:
        return all(np.dtype(graph.tensors[t].dtype).kind in "biuf" for t in model.inputs)
    except TypeError:
        return False
