"""Running a model, or a segment of it, for fixed taps (`bitwright.backend.Session`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.backend import Batch, Tap, reduced, thinned_places
from bitwright.data import fed
from bitwright.errors import InputError, ModelError
from bitwright.graph import TensorId
from bitwright_tensorflow.graph.graphs import Spec, extract
from bitwright_tensorflow.graph.model import Array, GraphDef, TfModel
from bitwright_tensorflow.graph.runtime import open_graph, reason
from bitwright_tensorflow.graph.shapes import inference

_NEVER_NEGATIVE = frozenset({"Relu", "Relu6", "Sigmoid", "Softmax", "Softplus", "Abs", "Square"})


class TfSession:
    """Hands out taps; reductions are computed in the graph, so that only their results leave it.

    Args:
        graph_def: the nodes.
        values: contents of the variables by node name.
        taps: inputs, intermediate tensors or outputs.
        feeds: tensors that `run` is given.
        spec: type and shape of the tensors fed.
        controlled: nodes whose control dependencies count (see `graphs.extract`).
        renamed: where a tapped tensor is found, if not under its own name.

    Raises:
        ModelError: a tap is unknown or can't be computed from the feeds, or TensorFlow refuses the graph.
    """

    def __init__(
        self,
        graph_def: GraphDef,
        values: Mapping[str, Array],
        taps: Sequence[Tap],
        feeds: Sequence[TensorId],
        spec: Callable[[TensorId], Spec],
        *,
        controlled: Sequence[str] = (),
        renamed: Mapping[TensorId, TensorId] | None = None,
    ) -> None:
        self.taps = tuple(dict.fromkeys(taps))
        where = dict(renamed or {})
        self._passed = {t for t in self.taps if where.get(t.tensor, t.tensor) in feeds}
        computed = [t for t in self.taps if t not in self._passed]
        self._inputs: dict[TensorId, tuple[np.dtype[Any], Any]] = {}
        self._call: Callable[..., Any] | None = None
        if computed:
            fetches = list(dict.fromkeys(where.get(t.tensor, t.tensor) for t in computed))
            part, places = extract(graph_def, feeds, fetches, spec, controlled=controlled)
            self.session = open_graph(part, values)
            graph = self.session.graph
            with graph.as_default():
                results = [_reduced(graph.get_tensor_by_name(where.get(t.tensor, t.tensor)), t) for t in computed]
            held = {feed: graph.get_tensor_by_name(place) for feed, place in places.items()}
            self._inputs = {feed: (np.dtype(t.dtype.as_numpy_dtype), t.shape) for feed, t in held.items()}
            self._call = self.session.make_callable(results, feed_list=list(held.values()))
        self._computed = computed
        passed = {where.get(t.tensor, t.tensor): t.tensor for t in self._passed}
        self._needed = tuple(dict.fromkeys([*self._inputs, *passed]))

    @property
    def needs(self) -> tuple[TensorId, ...]:
        """Tensors that `run` must be given."""
        return self._needed

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """Feed one batch; arrays that the taps don't depend on are ignored.

        Raises:
            InputError: a needed array is missing, or has the wrong dtype, rank or shape.
            ModelError: an op failed while running.
        """
        for name in self._needed:
            if name not in batch:
                raise InputError(f"the batch has no array for input {name!r}; it holds {', '.join(batch) or 'nothing'}")
        results: dict[Tap, Array] = {t: reduced(np.asarray(batch[t.tensor]), t) for t in self._passed}
        if self._call is not None:
            given = [self._typed(name, batch[name]) for name in self._inputs]
            try:
                results.update(zip(self._computed, self._call(*given), strict=True))
            except tf.errors.OpError as error:
                raise ModelError(f"running the model failed: {reason(error)}") from error
        return {tap: results[tap] for tap in self.taps}

    def _typed(self, name: TensorId, value: Any) -> Array:
        dtype, shape = self._inputs[name]
        array = np.asarray(value) if dtype.kind in "OUS" else fed(value, dtype.name, name)
        if not shape.is_compatible_with(array.shape):
            raise InputError(f"input {name!r} takes shape {shape}, the batch holds {array.shape}")
        return array


def _reduced(tensor: Any, tap: Tap) -> Any:
    """The tensor itself, thinned, or its minimum and maximum."""
    if tap.reduce == "none":
        if tap.step == 1:
            return tf.identity(tensor)
        return _thinned(tensor, tap.step, tap.axis)
    rank = tensor.shape.rank
    if tap.axis is None:
        axes = None
    elif rank is None:
        raise ModelError(f"tensor {tap.tensor!r} has no known rank; its channels can't be told apart")
    else:
        axes = [i for i in range(rank) if i != tap.axis % rank]
    high = tf.reduce_max(tensor, axes)
    low = tf.zeros_like(high) if tensor.op.type in _NEVER_NEGATIVE else tf.reduce_min(tensor, axes)
    return tf.cast(tf.stack([low, high]), tf.float32)


def _thinned(tensor: Any, step: int, axis: int | None) -> Any:
    """As the core's `thinned`, in the graph."""
    known = tensor.shape.rank is not None and tensor.shape[1:].is_fully_defined()
    if not known and axis not in (None, 0, 1):
        order = [0, axis, *(i for i in range(1, tensor.shape.rank) if i != axis)]
        tensor = tf.transpose(tensor, order)
    flat = tf.reshape(tensor, [tf.shape(tensor)[0], -1])
    places = thinned_places(tuple(tensor.shape[1:].as_list()), step, axis) if known else None
    return flat[:, ::step] if places is None else tf.gather(flat, places, axis=1)


def open_taps(model: TfModel, taps: Sequence[Tap], feeds: Sequence[TensorId] | None = None) -> TfSession:
    """A session on the float model, from its inputs or from `feeds`.

    Raises:
        ModelError: a tap is unknown, or can't be computed from the feeds alone.
    """
    part = inference(model)
    for tensor in (*(t.tensor for t in taps), *(feeds or ())):
        known_tensor(model, tensor)
    return TfSession(
        model.graph_def, model.values, taps, model.inputs if feeds is None else feeds, part.spec,
        controlled=tuple(part.controlled),
    )  # fmt: skip


def known_tensor(model: TfModel, tensor: TensorId) -> None:
    """Refuse a name that is no tensor between the model's inputs and outputs.

    Raises:
        ModelError: it isn't.
    """
    try:
        inference(model).spec(tensor)
    except (KeyError, ValueError):
        raise ModelError(f"the model has no tensor {tensor!r} between its inputs and outputs") from None
