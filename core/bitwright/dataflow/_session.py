"""Running a dataflow model: one pure program from feeds to taps, compiled once, with grids and parameters fed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch, Tap, between, feed, handed_out, not_computable, require_tensors
from bitwright.dataflow._model import FlowModel, Function
from bitwright.dataflow._namespace import FlowNamespace
from bitwright.dataflow._rounding import Form, Numbers, numbers_of
from bitwright.files import Array
from bitwright.graph import Op, TensorId
from bitwright.grids import Encoding

Value = Any
"""An array of the framework."""
Values = Mapping[str, Value]
Program = Callable[[Values, Values, Values], list[Value]]
"""From parameters, numbers of grids and feeds, all by name, to what each tap hands out. Pure."""


class Runner(Protocol):
    """What sessions need of a `FlowBackend`."""

    namespace: FlowNamespace

    def compile_program(self, program: Program, /) -> Program:
        """Make a program fast."""

    def array(self, x: NDArray[Any], /) -> Value:
        """A numpy array as one of the framework's."""

    def numpy(self, x: Value, /) -> NDArray[Any]:
        """The other way."""

    def function_of(self, model: Any, op: Op, /) -> Function:
        """What an op computes."""

    def rounded(self, x: Value, numbers: tuple[Value, Value, Value], form: Form, /) -> Value:
        """A tensor on its grid."""


class FlowSession:
    """The ops between feeds and taps, in order.

    Without `feeds` it is the whole model, fed by its inputs, which have sites of their own; the feeds of a segment
    are taken as they are given. The encodings and parameters in force are those of the moment that `run` is called.
    """

    def __init__(
        self,
        backend: Runner,
        model: FlowModel,
        taps: Sequence[Tap],
        feeds: Sequence[TensorId] | None = None,
    ) -> None:
        self.backend, self.model, self.taps, self.whole = backend, model, tuple(taps), feeds is None
        graph = model.graph
        given = graph.inputs if feeds is None else tuple(feeds)
        wanted = [t.tensor for t in taps]
        require_tensors((*wanted, *given), graph.tensors)
        self.ops, missing = between(graph.ops, lambda o: o.data_inputs, lambda o: o.outputs, wanted, given)
        if missing:
            raise not_computable(wanted, given, missing)
        self._functions: list[Function] = [backend.function_of(model, op) for op in self.ops]
        read = {*wanted, *(t for op in self.ops for t in op.data_inputs)}
        self.feeds = tuple(t for t in given if t in read)
        self._params = tuple(dict.fromkeys(p for op in self.ops for p in op.params.values()))
        made = (t for op in self.ops for t in op.outputs if t not in given)
        self._sites = (*(self.feeds if self.whole else ()), *made)
        self._last_use = {t: i for i, op in enumerate(self.ops) for t in op.data_inputs}
        self._numbers: dict[TensorId, tuple[Encoding, Numbers]] = {}

    def run(self, batch: Batch) -> Mapping[Tap, Array]:
        """Feed, and compute what is tapped.

        Raises:
            InputError: a feed is missing, or doesn't fit.
        """
        model, known, array = self.model, self.model.graph.tensors, self.backend.array
        feeds = {t: array(feed(batch, t, known[t].dtype, known[t].shape)) for t in self.feeds}
        in_force = {s: e for s in self._sites if (e := model.encodings.get(s)) is not None}
        forms = tuple((site, Form.of(encoding)) for site, encoding in in_force.items())
        key = (self.taps, self.feeds, self.whole, forms)
        program = model.programs.get(key)
        if program is None:
            program = model.programs[key] = self.backend.compile_program(self._program(dict(forms)))
        params = {p: model.array(p, array) for p in self._params}
        values = program(params, {s: self._numbers_of(s, e) for s, e in in_force.items()}, feeds)
        return {tap: np.asarray(self.backend.numpy(v)) for tap, v in zip(self.taps, values, strict=True)}

    def _numbers_of(self, site: TensorId, encoding: Encoding) -> Numbers:
        held = self._numbers.get(site)
        if held is None or held[0] is not encoding:
            scale, low, high = (self.backend.array(n) for n in numbers_of(encoding))
            held = self._numbers[site] = (encoding, (scale, low, high))
        return held[1]

    def _program(self, forms: Mapping[TensorId, Form]) -> Program:
        def program(params: Values, numbers: Values, feeds: Values) -> list[Value]:
            def rounded(site: TensorId, x: Value) -> Value:
                return self.backend.rounded(x, numbers[site], forms[site]) if site in forms else x

            return self.computed(params, feeds, rounded)

        return program

    def computed(self, params: Values, feeds: Values, rounded: Callable[[TensorId, Value], Value]) -> list[Value]:
        """What each tap hands out, in arrays of the framework.

        Args:
            params: in native layout, by name.
            feeds: by name.
            rounded: what is made of each tensor.
        """
        kept = {t.tensor for t in self.taps}
        values = {t: rounded(t, feeds[t]) for t in self.feeds}
        for i, (op, function) in enumerate(zip(self.ops, self._functions, strict=True)):
            inputs = tuple(values[t] for t in op.data_inputs)
            results = function(inputs, {role: params[p] for role, p in op.params.items()})
            for t, y in zip(op.outputs, results, strict=True):
                if t not in values:  # a segment may be fed one of several outputs
                    values[t] = rounded(t, y)
            for t in op.data_inputs:
                if self._last_use[t] == i and t not in kept:
                    values.pop(t, None)
        return [handed_out(self.backend.namespace, values[tap.tensor], tap) for tap in self.taps]
