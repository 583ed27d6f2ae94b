"""Running a model in normal form, or a part of it, to hand out tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import keras

from bitwright.backend import Batch, Tap, thinned_places
from bitwright.data import fed
from bitwright.errors import InputError, ModelError
from bitwright.files import Array
from bitwright.graph import ActivationAttrs, Graph, TensorId
from bitwright_keras.graph.engine import as_numpy, compiled
from bitwright_keras.graph.model import KerasModel, Node
from bitwright_keras.graph.optable import NEVER_NEGATIVE


class KerasSession:
    """A model, or a segment of it, compiled for fixed taps (`bitwright.backend.Session`).

    Taps with reduction "minmax" are reduced on the device, right after their tensor is computed.

    Args:
        model: in normal form; layers' variables are read at each run.
        graph: its canonical graph (a simulation's: that of the float model).
        taps: what to hand out.
        feeds: tensors to feed in place of the model's inputs.
        aliases: the model's name of a tensor that is known under another.

    Raises:
        ModelError: a tap is unknown or can't be computed from the feeds.
    """

    def __init__(
        self,
        model: KerasModel,
        graph: Graph,
        taps: Sequence[Tap],
        feeds: Sequence[TensorId] | None = None,
        aliases: Mapping[TensorId, TensorId] | None = None,
    ) -> None:
        self.taps = tuple(dict.fromkeys(taps))
        for name in (*(t.tensor for t in self.taps), *(feeds or ())):
            if name not in graph.tensors:
                raise ModelError(f"the model has no tensor {name!r}")
        known = aliases or {}
        # A fed tensor is taken as it is given: in a simulation, as it is after its quantizer.
        sources = {t: t for t in model.inputs} if feeds is None else {known.get(t, t): t for t in feeds}
        self._ids = {tap: known.get(tap.tensor, tap.tensor) for tap in self.taps}
        self._nodes = _part(model, self._ids.values(), sources, [t.tensor for t in self.taps])
        read = {t for node in self._nodes for t in node.inputs} | set(self._ids.values())
        self._feeds = {id: name for id, name in sources.items() if id in read}
        self._specs = {name: model.specs[id] for id, name in self._feeds.items()}
        self._zero = {self._ids[t] for t in self.taps if t.reduce == "minmax" and _never_negative(graph, t.tensor)}
        variables = {id(v): v for node in self._nodes if node.layer is not None for v in node.layer.variables}
        inputs = [self._specs[n] for n in self._feeds.values()]
        self._function = compiled(self._compute, inputs, list(variables.values()))

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the tensors that `run` must be given."""
        return tuple(self._feeds.values())

    def run(self, batch: Batch) -> dict[Tap, Array]:
        """Feed one batch; arrays that the taps don't depend on are ignored.

        Raises:
            InputError: a needed array is missing, or has the wrong dtype or shape.
            ModelError: an op failed while running.
        """
        tensors = [self._tensor(name, batch) for name in self._feeds.values()]
        try:
            results = self._function(*tensors)
        except Exception as error:
            given = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(self.needs, tensors, strict=True))
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ModelError(f"running the model on {given} failed: {said[:300]}") from error
        return {tap: as_numpy(value) for tap, value in zip(self.taps, results, strict=True)}

    def _tensor(self, name: str, batch: Batch) -> Any:
        if name not in batch:
            raise InputError(f"the batch has no array for input {name!r}; it holds {', '.join(batch) or 'nothing'}")
        array, spec = batch[name], self._specs[name]
        if not keras.ops.is_tensor(array):
            array = fed(array, spec.dtype, name)
        shape = tuple(array.shape)
        if len(shape) != len(spec.shape) or any(n not in (None, m) for n, m in zip(spec.shape, shape, strict=True)):
            raise InputError(f"input {name!r} has shape {spec.shape} (None: free), the batch holds {shape}")
        return keras.ops.convert_to_tensor(array, dtype=spec.dtype)

    def _compute(self, *tensors: Any) -> list[Any]:
        values: dict[TensorId, Any] = dict(zip(self._feeds, tensors, strict=True))
        wanted: dict[TensorId, list[Tap]] = {}
        for tap, id in self._ids.items():
            wanted.setdefault(id, []).append(tap)
        left: dict[TensorId, int] = {}
        for node in self._nodes:
            for t in set(node.inputs):
                left[t] = left.get(t, 0) + 1
        found: dict[Tap, Any] = {}
        for id in list(values):
            self._hand_out(id, values[id], wanted, found)
        for node in self._nodes:
            args, kwargs = node.filled(values)
            results = keras.tree.flatten(node.operation(*args, **kwargs))
            for id, result in zip(node.outputs, results, strict=True):
                self._hand_out(id, result, wanted, found)
                if id in left:
                    values[id] = result
            for t in set(node.inputs):
                left[t] -= 1
                if not left[t]:
                    del values[t]
        return [found[tap] for tap in self.taps]

    def _hand_out(self, id: TensorId, value: Any, wanted: Mapping[TensorId, list[Tap]], found: dict[Tap, Any]) -> None:
        for tap in wanted.get(id, ()):
            found[tap] = _reduced(value, tap, id in self._zero)


def _reduced(value: Any, tap: Tap, never_negative: bool) -> Any:
    if tap.reduce == "minmax":
        axes = None if tap.axis is None else tuple(i for i in range(len(value.shape)) if i != tap.axis)
        high = keras.ops.max(value, axis=axes)
        low = keras.ops.zeros_like(high) if never_negative else keras.ops.min(value, axis=axes)
        return keras.ops.cast(keras.ops.stack([low, high]), "float32")
    if tap.step > 1:
        return _thinned(value, tap.step, tap.axis)
    return value


def _thinned(value: Any, step: int, axis: int | None) -> Any:
    """As the core's `thinned`, in the graph."""
    sizes = tuple(value.shape)[1:]
    known = None not in sizes
    if not known and axis not in (None, 0, 1):
        value = keras.ops.moveaxis(value, axis, 1)
    flat = keras.ops.reshape(value, (keras.ops.shape(value)[0], -1))
    places = thinned_places(sizes, step, axis) if known else None
    return flat[:, ::step] if places is None else keras.ops.take(flat, places, axis=1)


def _never_negative(graph: Graph, tensor: TensorId) -> bool:
    op = graph.producer(tensor)
    if op is None or op.type not in NEVER_NEGATIVE:
        return False
    return op.type != "Clip" or (isinstance(op.attrs, ActivationAttrs) and op.attrs.minimum == 0)


def _part(
    model: KerasModel, wanted: Collection[TensorId], sources: Mapping[TensorId, TensorId], names: Sequence[str]
) -> tuple[Node, ...]:
    """The calls between some tensors and others.

    Raises:
        ModelError: a wanted tensor depends on a model input that is no source.
    """
    needed = {t for t in wanted if t not in sources}
    kept: list[Node] = []
    for node in reversed(model.nodes):
        if not needed.isdisjoint(node.outputs):
            kept.append(node)
            needed.update(t for t in node.inputs if t not in sources)
    if missing := [t for t in model.inputs if t in needed]:
        raise ModelError(
            f"{', '.join(map(repr, dict.fromkeys(names)))} can't be computed from "
            f"{', '.join(map(repr, sources.values()))} alone: input {missing[0]!r} is needed"
        )
    return tuple(reversed(kept))
