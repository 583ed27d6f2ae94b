"""Running a model in normal form, or a part of it, to hand out tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from bitwright.backend import Batch, Tap, between, check_shape, fed, given, handed_out, not_computable, require_tensors
from bitwright.errors import ModelError
from bitwright.files import Array
from bitwright.graph import ActivationAttrs, Graph, TensorId, never_negative
from bitwright_keras.graph.engine import Function, as_numpy, compiled, traces_once
from bitwright_keras.graph.model import KerasModel
from bitwright_keras.graph.native import first_line

Switches = tuple[bool, ...]


class KerasSession:
    """A model, or a segment of it, compiled for fixed taps (`bitwright.backend.Session`).

    Taps with reduction "minmax" are reduced on the device, right after their tensor is computed.

    Args:
        model: in normal form; layers' variables are read at each run.
        graph: its canonical graph (a simulation's: that of the float model).
        taps: what to hand out.
        feeds: tensors to feed in place of the model's inputs.
        aliases: the model's name of a tensor that is known under another.
        switches: gives what a simulation's quantizers are set to, on or off: where that stays as it is, the compiled
            function holds no branches for it.

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
        switches: Callable[[], Switches] | None = None,
    ) -> None:
        self.taps = tuple(dict.fromkeys(taps))
        require_tensors((*(t.tensor for t in self.taps), *(feeds or ())), graph.tensors)
        known = aliases or {}
        # A fed tensor is taken as it is given: in a simulation, as it is after its quantizer.
        sources = {t: t for t in model.inputs} if feeds is None else {known.get(t, t): t for t in feeds}
        self._ids = {tap: known.get(tap.tensor, tap.tensor) for tap in self.taps}
        wanted = self._ids.values()
        self._nodes, missing = between(model.nodes, lambda n: n.inputs, lambda n: n.outputs, wanted, sources)
        if missing:
            raise not_computable((t.tensor for t in self.taps), sources.values(), missing)
        read = {t for node in self._nodes for t in node.inputs} | set(self._ids.values())
        self._feeds = {id: name for id, name in sources.items() if id in read}
        self._specs = {name: model.specs[id] for id, name in self._feeds.items()}
        self._zero = {self._ids[t] for t in self.taps if t.reduce == "minmax" and _never_negative(graph, t.tensor)}
        self._switches = switches
        self._switched = switches() if switches is not None and traces_once() else None
        self._function = self._compiled()

    def _compiled(self) -> Function:
        variables = {id(v): v for node in self._nodes if node.layer is not None for v in node.layer.variables}
        inputs = [self._specs[n] for n in self._feeds.values()]
        return compiled(self.compute, inputs, list(variables.values()), as_switched=self._switched is not None)

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
        tensors = self.tensors(batch)
        if self._switches is not None and self._switched is not None and self._switches() != self._switched:
            self._switched = None  # who turns one will turn more: from here on each is looked at in every run
            self._function = self._compiled()
        try:
            results = self._function(*tensors)
        except Exception as error:
            given = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(self.needs, tensors, strict=True))
            raise ModelError(f"running the model on {given} failed: {first_line(error)}") from error
        return {tap: as_numpy(value) for tap, value in zip(self.taps, results, strict=True)}

    def tensors(self, batch: Batch) -> list[Any]:
        """What a batch holds for each tensor of `needs`.

        Raises:
            InputError: an array is missing, or has the wrong dtype or shape.
        """
        return [self._tensor(name, batch) for name in self.needs]

    def _tensor(self, name: str, batch: Batch) -> Any:
        array, spec = given(batch, name), self._specs[name]
        if not keras.ops.is_tensor(array):
            array = fed(array, spec.dtype, name)
        check_shape(name, array.shape, spec.shape)
        return keras.ops.convert_to_tensor(array, dtype=spec.dtype)

    def compute(self, *tensors: Any) -> list[Any]:
        """What each tap hands out, for these tensors."""
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
            found[tap] = handed_out(_Taps, value, tap, never_negative=id in self._zero)


class _Taps:
    """`bitwright.backend._sessions.TapNamespace` of keras.ops."""

    zeros_like = staticmethod(keras.ops.zeros_like)
    second = staticmethod(lambda x, axis: keras.ops.moveaxis(x, axis, 1))
    every = staticmethod(lambda x, step: x[:, ::step])
    take = staticmethod(lambda x, places: keras.ops.take(x, places, axis=1))
    shape = staticmethod(lambda x: tuple(x.shape))
    highest = staticmethod(lambda x, axes: keras.ops.max(x, axis=axes))
    extremes = staticmethod(lambda x, axes: (keras.ops.min(x, axis=axes), keras.ops.max(x, axis=axes)))
    pair = staticmethod(lambda low, high: keras.ops.cast(keras.ops.stack([low, high]), "float32"))
    by_sample = staticmethod(lambda x: keras.ops.reshape(x, (keras.ops.shape(x)[0], -1)))


def _never_negative(graph: Graph, tensor: TensorId) -> bool:
    op = graph.producer(tensor)
    low = op.attrs.minimum if op is not None and isinstance(op.attrs, ActivationAttrs) else None
    return op is not None and never_negative(op.type, low)
