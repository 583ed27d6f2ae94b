"""What was captured against what the user holds, on one batch: no wrong float model gets further than this.

Only what computes and nothing else is run: a function that assigns variables, draws random numbers or reaches outside
of its graph is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.backend import alike, precision_of, trial_batches
from bitwright.errors import ModelError
from bitwright_tensorflow.capture.trust import closure
from bitwright_tensorflow.graph.canonical import recognize
from bitwright_tensorflow.graph.model import VARIABLES, Array, NodeDef, TfModel, open_session

_HARMLESS = VARIABLES | {
    "Assert", "Case", "If", "LookupTableFindV2", "PartitionedCall", "ReadVariableOp", "ResourceGather",
    "ResourceGatherNd", "StatefulPartitionedCall", "While",
}  # fmt: skip
"""Ops that TensorFlow calls stateful, which change nothing."""

Results = Mapping[str, Any]
"""By result name, as in `Signature.outputs`."""


def compare(model: TfModel, run: Callable[[Sequence[Array]], Results], sample: Sequence[Any] | None = None) -> None:
    """Refuse a capture that computes something else than the user's function or session.

    Args:
        model: what was captured.
        run: the user's own, on arrays in the order of the model's inputs.
        sample: one batch in that order; without one, numbers are made up (which needn't suit the model: then nothing
            is compared).

    Raises:
        ModelError: an output differs.
    """
    outputs = model.signature.outputs
    for batch in _batches(model, sample):
        try:
            expected = run(batch)
        except Exception:  # whatever TensorFlow says of numbers that don't suit it
            continue
        with open_session(model) as session:
            found = session.run(dict(outputs), dict(zip(model.inputs, batch, strict=True)))
        precision = precision_of(np.asarray(v).dtype.name for v in (*batch, *expected.values()))
        for name, tensor in outputs.items():
            if not alike([np.asarray(expected[name])], [np.asarray(found[name])], precision):
                raise ModelError(
                    f"the captured graph gives other results at output {name!r} ({tensor}) than the model itself, on "
                    "equal inputs; this is a fault of the capture, please report it with the model"
                )
        return


def of_function(function: Any, model: TfModel, sample: Any = None) -> None:
    """Compare a concrete function with its capture (see `compare`).

    Args:
        function: the user's.
        model: what it was captured as.
        sample: what it was traced with: an array, a tuple, or a mapping by argument name.

    Raises:
        ModelError: an output differs.
    """
    graph_def = function.graph.as_graph_def()
    if not only_computes([*graph_def.node, *(n for f in graph_def.library.function for n in f.node_def)]):
        return
    given = function.structured_input_signature
    leaves = [x for x in tf.nest.flatten(given) if isinstance(x, tf.TensorSpec)]
    if len(leaves) != len(model.inputs):
        return

    def run(arrays: Sequence[Array]) -> Results:
        fed = iter(tf.constant(a, spec.dtype) for a, spec in zip(arrays, leaves, strict=True))
        args, kwargs = tf.nest.map_structure(lambda x: next(fed) if isinstance(x, tf.TensorSpec) else x, given)
        flat = [x.numpy() for x in tf.nest.flatten(function(*args, **kwargs))]
        return dict(zip(model.signature.outputs, flat, strict=True))

    compare(model, run, None if sample is None else _in_order(sample, given))


def _in_order(sample: Any, given: Any) -> list[Any] | None:
    """A sample's arrays in the order of a function's arguments."""
    if isinstance(sample, Mapping):
        names = [spec.name for spec in tf.nest.flatten(given) if isinstance(spec, tf.TensorSpec)]
        return [sample[n] for n in names] if set(names) == set(sample) else None
    return list(sample) if isinstance(sample, tuple | list) else [sample]


def of_session(session: Any, model: TfModel, constants: Mapping[str, Any]) -> None:
    """Compare a session with its capture (see `compare`).

    Args:
        session: the user's.
        model: what it was captured as.
        constants: placeholders that are fed what inference takes.

    Raises:
        ModelError: an output differs.
    """
    if not only_computes(closure(session.graph.as_graph_def(), model.signature.outputs.values())):
        return
    fixed = {session.graph.get_tensor_by_name(f"{str(n).partition(':')[0]}:0"): v for n, v in constants.items()}

    def run(arrays: Sequence[Array]) -> Results:
        fed = {session.graph.get_tensor_by_name(t): a for t, a in zip(model.inputs, arrays, strict=True)}
        found: Results = session.run(dict(model.signature.outputs), {**fixed, **fed})
        return found

    compare(model, run)


def only_computes(nodes: Iterable[NodeDef]) -> bool:
    """Whether running the nodes changes nothing and gives the same each time."""
    from tensorflow.python.framework import op_def_registry

    for node in nodes:
        known = op_def_registry.get(node.op)
        if known is not None and known.is_stateful and node.op not in _HARMLESS:
            return False
    return True


def _batches(model: TfModel, sample: Sequence[Any] | None) -> Iterator[list[Array]]:
    """The sample's first rows, or batches that are made up; none for inputs that aren't plain numbers."""
    graph = recognize(model).graph
    specs = [(graph.tensors[t].shape or (), graph.tensors[t].dtype) for t in model.inputs]
    if sample is not None:
        if len(sample) == len(specs):
            yield from trial_batches(specs, [np.asarray(x) for x in sample])
        return
    if any(graph.tensors[t].shape is None for t in model.inputs):
        return
    try:
        kinds = [np.dtype(dtype) for _, dtype in specs]
    except TypeError:
        return
    if all(kind.kind in "biuf" for kind in kinds):
        for batch in trial_batches(specs, None):
            yield [x.astype(kind) for x, kind in zip(batch, kinds, strict=True)]
