"""Running a model, or a segment of it, for fixed taps (`bitwright.backend.Session`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from bitwright.backend import Batch, Tap, feed, given, handed_out, reduced
from bitwright.errors import ModelError
from bitwright.graph import TensorId, never_negative
from bitwright_tensorflow.graph.graphs import Spec, extract
from bitwright_tensorflow.graph.model import Array, GraphDef, TfModel
from bitwright_tensorflow.graph.runtime import open_graph, reason
from bitwright_tensorflow.graph.shapes import inference


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
                found = [(graph.get_tensor_by_name(where.get(t.tensor, t.tensor)), t) for t in computed]
                results = [_handed_out(tensor, tap) for tensor, tap in found]
            held = {name: graph.get_tensor_by_name(place) for name, place in places.items()}
            self._inputs = {name: (np.dtype(t.dtype.as_numpy_dtype), t.shape) for name, t in held.items()}
            self._fed = tuple(held)
            self._call = self.session.make_callable(results, feed_list=list(held.values()))
        self._computed = computed
        self._places = {t: where.get(t.tensor, t.tensor) for t in self._passed}
        for name in self._places.values():
            dtype, shape = spec(name)
            self._inputs.setdefault(name, (np.dtype(dtype.as_numpy_dtype), shape))
        self._needed = tuple(self._inputs)

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
        fed = {name: self._typed(name, batch) for name in self._needed}
        results: dict[Tap, Array] = {tap: reduced(fed[place], tap) for tap, place in self._places.items()}
        if self._call is not None:
            try:
                results.update(zip(self._computed, self._call(*(fed[n] for n in self._fed)), strict=True))
            except tf.errors.OpError as error:
                raise ModelError(f"running the model failed: {reason(error)}") from error
        return {tap: results[tap] for tap in self.taps}

    def _typed(self, name: TensorId, batch: Batch) -> Array:
        dtype, shape = self._inputs[name]
        if dtype.kind in "OUS":
            return np.asarray(given(batch, name))
        return feed(batch, name, dtype.name, None if shape.rank is None else shape.as_list())


class _Taps:
    """`bitwright.backend._sessions.TapNamespace` of TensorFlow."""

    zeros_like = staticmethod(tf.zeros_like)
    shape = staticmethod(lambda x: None if x.shape.rank is None else tuple(x.shape.as_list()))
    second = staticmethod(lambda x, axis: tf.transpose(x, [0, axis, *(i for i in range(1, x.shape.rank) if i != axis)]))
    highest = staticmethod(tf.reduce_max)
    extremes = staticmethod(lambda x, axes: (tf.reduce_min(x, axes), tf.reduce_max(x, axes)))
    pair = staticmethod(lambda low, high: tf.cast(tf.stack([low, high]), tf.float32))
    by_sample = staticmethod(lambda x: tf.reshape(x, [tf.shape(x)[0], -1]))
    every = staticmethod(lambda x, step: x[:, ::step])
    take = staticmethod(lambda x, places: tf.gather(x, places, axis=1))


def _handed_out(tensor: Any, tap: Tap) -> Any:
    """The tensor itself, thinned, or its minimum and maximum."""
    found = handed_out(_Taps, tensor, tap, never_negative=never_negative(tensor.op.type))
    return tf.identity(tensor) if found is tensor else found


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
    """Refuse a name that is not a tensor between the model's inputs and outputs.

    Raises:
        ModelError: it isn't.
    """
    try:
        inference(model).spec(tensor)
    except (KeyError, ValueError):
        raise ModelError(f"the model has no tensor {tensor!r} between its inputs and outputs") from None
