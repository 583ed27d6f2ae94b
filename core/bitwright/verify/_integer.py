"""Exact integer simulation: the codes that an integer runtime computes, op by op.

A float simulation and an integer runtime differ in summation order and fusion, and rounding amplifies the last
float bit with depth. This simulation has no such freedom: accumulators are exact, and requantization follows the
runtime's float32 steps. Ops that integer runtimes run in float (hard-swish, norms, unknown ops) are run by the
backend's own float kernels, on parameters rounded to their grids, between a dequantization and a quantization, as the
runtime does. Which ops come out equal to the bit, and which don't and why, says `IntegerSimulation.uncovered`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Batch, Capability, PartialExecution, Session, Tap, require
from bitwright.calibration import bias_encoding, fits_accumulator, quantized_weights
from bitwright.errors import InputError
from bitwright.graph import (
    LINEAR_KINDS,
    ActivationAttrs,
    AxisAttrs,
    Graph,
    Op,
    OpId,
    OpKind,
    ParamId,
    ParamRole,
    PoolAttrs,
    ProductAttrs,
    TensorId,
)
from bitwright.grids import Encoding, EncodingTable
from bitwright.verify import _integer_kernels as kernels
from bitwright.verify._integer_coverage import uncovered

ACCUMULATOR = 2**31


@dataclass(frozen=True)
class _Fused:
    """An op and the activation that an integer kernel takes in: the output's site and the code bounds."""

    op: Op
    output: TensorId
    low: int
    high: int
    swallowed: Op | None = None


class IntegerSimulation:
    """Runs a graph in integers.

    Args:
        backend: runs the ops that have no integer kernel; needs partial execution.
        model: the float model.
        graph: its graph.
        table: one encoding for every quantized site (`QuantSim.table`).

    Raises:
        CapabilityError: the backend can't run parts of a model.
    """

    def __init__(self, backend: Backend[Any], model: object, graph: Graph, table: EncodingTable) -> None:
        require(backend, {Capability.PARTIAL_EXECUTION}, "exact integer simulation")
        assert isinstance(backend, PartialExecution)
        self._backend, self._model, self._graph, self._table = backend, model, graph, table
        self._segments: dict[str, Session] = {}
        self._rounded: Any = None
        self._weights: dict[str, NDArray[np.int32]] = {}
        self._fused = {op.id: f for op in graph.ops if (f := self._fusion(op)) is not None}
        self._skipped = {f.swallowed.id for f in self._fused.values() if f.swallowed is not None}
        left = [op for op in graph.ops if op.id not in self._skipped]
        written = [(self._fused[op.id].output,) if op.id in self._fused else op.outputs for op in left]
        self.graph, self.table = graph, table
        self.written: tuple[TensorId, ...] = tuple(t for outputs in written for t in outputs)
        """Tensors that exist on their own, in order: not those that a kernel fuses away."""
        self._last_use = {t: i for i, op in enumerate(graph.ops) for t in op.data_inputs}
        self._inputs: dict[TensorId, NDArray[Any]] = {}
        self.uncovered: Mapping[OpId, str] = uncovered(graph, table, self._fused, self._skipped)
        """Ops that may differ from the runtime in a last bit or more, with the reason; the others are equal to it."""
        self._known: tuple[Batch, Mapping[TensorId, NDArray[Any]]] = ({}, {})
        self.peaks: dict[str, float] = {}
        """Largest accumulator magnitude seen at each integer linear op, as a share of int32's range."""

    @property
    def integer_ops(self) -> tuple[str, ...]:
        """Ops that run in integers, the others run in float."""
        return tuple(self._fused)

    def session(self, taps: Sequence[Tap]) -> Session:
        """A session that hands out tensors, dequantized."""
        return _IntegerSession(self, tuple(taps))

    def run(self, batch: Batch, wanted: Sequence[TensorId]) -> dict[TensorId, NDArray[np.float32]]:
        """Dequantized values of the wanted tensors for one batch."""
        values = self.codes(batch, wanted)
        return {t: self._real(t, values[t]) for t in wanted}

    def codes(
        self,
        batch: Batch,
        wanted: Sequence[TensorId],
        given: Mapping[TensorId, NDArray[Any]] | None = None,
    ) -> dict[TensorId, NDArray[Any]]:
        """Integer codes of the wanted tensors for one batch; real values where a tensor isn't quantized.

        Args:
            batch: the model's inputs.
            wanted: tensors.
            given: real values that the ops behind a tensor read in place of what was computed for it, so that each
                op can be compared with a runtime from the runtime's own operands. What is returned is the computed.

        Raises:
            InputError: an input is missing, or a wanted tensor doesn't exist on its own (fused away).
        """
        keep = set(wanted)
        replacing, computed = given or {}, dict[TensorId, NDArray[Any]]()
        # With the runtime's operands most ops get what they got in the plain run before: those give the same again.
        same = self._known[0].keys() == batch.keys() and all(v is batch[n] for n, v in self._known[0].items())
        known = self._known[1] if given is not None and same else {}
        self._inputs = {name: np.asarray(v) for name, v in batch.items()}
        held: dict[TensorId, NDArray[Any]] = {}
        for name in self._graph.inputs:
            if name not in batch:
                raise InputError(f"the batch lacks the input {name!r}")
            held[name] = self._coded(name, np.asarray(batch[name]))
        for index, op in enumerate(self._graph.ops):
            if op.id not in self._skipped:
                made = self._again(op, held, known) or self._computed(op, held)
                held.update(made)
                for t in made.keys() & replacing.keys():
                    computed[t] = made[t]
                    held[t] = self._coded(t, replacing[t])
            for t in op.data_inputs:
                if self._last_use[t] == index and t not in keep and t in held:
                    del held[t]
        if lost := [t for t in wanted if t not in held]:
            raise InputError(f"tensor {lost[0]!r} doesn't exist in the integer graph: it is fused into a kernel")
        if given is None:
            self._known = dict(batch), held
        return {t: computed[t] if t in computed else held[t] for t in wanted}

    def _computed(self, op: Op, held: Mapping[TensorId, NDArray[Any]]) -> dict[TensorId, NDArray[Any]]:
        fused = self._fused.get(op.id)
        return self._float(op, held) if fused is None else {fused.output: self._integer(fused, held)}

    def _again(
        self, op: Op, held: Mapping[TensorId, NDArray[Any]], known: Mapping[TensorId, NDArray[Any]]
    ) -> dict[TensorId, NDArray[Any]]:
        """What an op gave for the very operands that it is to read now; nothing where they aren't known or differ."""
        outputs = (self._fused[op.id].output,) if op.id in self._fused else op.outputs
        if any(t not in known for t in (*op.data_inputs, *outputs)):
            return {}
        if not all(np.array_equal(held[t], known[t]) for t in op.data_inputs):
            return {}
        return {t: known[t] for t in outputs}

    # -- which ops run in integers

    def _grid(self, tensor: TensorId | None) -> Encoding | None:
        encoding = self._table.get(tensor) if tensor is not None else None
        if encoding is None or encoding.float_format is not None or encoding.scale.ndim:
            return None
        return encoding

    def _fusion(self, op: Op) -> _Fused | None:
        if not self._has_kernel(op):
            return None
        tensor, swallowed = op.output, None
        low, high = -np.inf, np.inf
        if tensor not in self._table:
            follower = self._graph.sole_consumer(tensor)
            if follower is None or follower.kind not in (OpKind.RELU, OpKind.CLIPPED_RELU):
                return None
            bounds = follower.attrs if isinstance(follower.attrs, ActivationAttrs) else ActivationAttrs()
            low = 0.0 if bounds.minimum is None else bounds.minimum
            high = np.inf if follower.kind is OpKind.RELU or bounds.maximum is None else bounds.maximum
            tensor, swallowed = follower.output, follower
        out = self._grid(tensor)
        if out is None:
            return None
        return _Fused(op, tensor, _code(out, low), _code(out, high), swallowed)

    def _has_kernel(self, op: Op) -> bool:
        if op.kind in LINEAR_KINDS:
            weight = self._table.get(op.weight or "")
            bias = op.params.get(ParamRole.BIAS)
            return (
                self._grid(op.data_inputs[0]) is not None
                and weight is not None
                and weight.float_format is None
                and weight.scale.ndim < 2
                and (bias is None or self._bias_grid(op, bias) is not None)
            )
        if op.kind in (OpKind.ADD, OpKind.MUL) and op.type != "Sum":  # a Sum may have constants that aren't shown
            operands = self._operands(op)
            return len(operands) == 2 and all(self._grid(t) is not None for t in operands)
        if op.kind is OpKind.MATMUL and op.type == "MatMul":
            if isinstance(op.attrs, ProductAttrs) and op.attrs.transposed is None:
                return False
            return len(op.data_inputs) == 2 and all(self._grid(t) is not None for t in op.data_inputs)
        if op.kind is OpKind.SOFTMAX:
            grid = self._grid(op.data_inputs[0])
            plain = op.type == "Softmax"  # not LogSoftmax, nor Hardmax
            return plain and isinstance(op.attrs, AxisAttrs) and grid is not None and grid.bits == 8
        if op.kind is OpKind.AVERAGE_POOL:
            attrs = op.attrs  # with neither a window nor axes, the geometry isn't known
            known = isinstance(attrs, PoolAttrs) and (attrs.window is not None or bool(attrs.axes))
            return known and self._grid(op.data_inputs[0]) is not None
        return False

    def _bias_grid(self, op: Op, bias: ParamId) -> Encoding | None:
        """The grid of an op's own accumulators; None where the bias has another grid, or is float and none of theirs.

        A bias that several ops share has an int32 form for each of them.
        """
        known = self._table.get(bias)
        if op.weight is None or (known is not None and known.bits != 32):
            return None
        inputs, weight = self._table[op.data_inputs[0]], self._table[op.weight]
        if known is None:
            value = self._backend.read(self._model, [bias])[bias]
            if not fits_accumulator(value, inputs.scale, weight.scale):
                return None  # in the exported file it stands behind the op
        return bias_encoding(inputs, weight)

    @staticmethod
    def _operands(op: Op) -> tuple[str, ...]:
        constant = op.params.get(ParamRole.CONSTANT)
        return op.data_inputs if constant is None else (*op.data_inputs, constant)

    # -- running

    def _coded(self, tensor: TensorId, values: NDArray[Any]) -> NDArray[Any]:
        encoding = self._table.get(tensor)
        if encoding is None:
            return values
        return encoding.quantize(values) if encoding.is_fixed else encoding.fake_quantize(values)

    def _real(self, tensor: TensorId, values: NDArray[Any]) -> NDArray[Any]:
        encoding = self._table.get(tensor)
        return values if encoding is None or not encoding.is_fixed else encoding.dequantize(values)

    def _float(self, op: Op, held: Mapping[TensorId, NDArray[Any]]) -> dict[TensorId, NDArray[Any]]:
        if op.id not in self._segments:
            taps = [Tap(t) for t in op.outputs if t in self._graph.tensors]
            # Shapes may be computed from the model's inputs.
            sources = tuple(dict.fromkeys((*op.data_inputs, *self._graph.inputs)))
            if self._rounded is None:
                used = {p for o in self._graph.ops if o.id not in self._fused for p in o.params.values()}
                self._rounded = quantized_weights(self._backend, self._model, self._table.restricted(used))
            self._segments[op.id] = self._backend.segment(self._rounded, sources, taps)
        feeds = {t: self._real(t, held[t]) for t in op.data_inputs}
        feeds = {**self._inputs, **feeds}
        outputs = self._segments[op.id].run(feeds)
        return {tap.tensor: self._coded(tap.tensor, v) for tap, v in outputs.items()}

    def _integer(self, fused: _Fused, held: Mapping[TensorId, NDArray[Any]]) -> NDArray[np.int32]:
        op, out = fused.op, self._table[fused.output]
        a = op.data_inputs[0]
        if op.kind in LINEAR_KINDS:
            return self._linear(fused, held[a], self._table[a], out)
        if op.kind is OpKind.AVERAGE_POOL:
            assert isinstance(op.attrs, PoolAttrs)
            axis = self._graph.tensors[a].channel_axis
            return kernels.average_pool(held[a], self._table[a], op.attrs, out, out.grid, axis)
        if op.kind is OpKind.SOFTMAX:
            assert isinstance(op.attrs, AxisAttrs)
            return kernels.softmax(held[a], self._table[a], op.attrs.axis, out)
        if op.kind is OpKind.MATMUL:
            b = op.data_inputs[1]
            turned = (isinstance(op.attrs, ProductAttrs) and op.attrs.transposed) or (False, False)
            operands = zip((a, b), turned, strict=True)
            first, second = (np.swapaxes(held[t], -1, -2) if turn else held[t] for t, turn in operands)
            total = kernels.matmul(first, self._table[a], second, self._table[b])
            self._note_peak(op, total)
            scale = np.asarray(self._table[a].scale * self._table[b].scale, np.float32)
            return kernels.requantize(total, scale, out, fused.low, fused.high)
        b = self._operands(op)[1]
        other = held[b] if b in held else self._constant(b)
        kernel = kernels.add if op.kind is OpKind.ADD else kernels.multiply
        return kernel(held[a], self._table[a], other, self._table[b], out, fused.low, fused.high)

    def _linear(self, fused: _Fused, codes: NDArray[Any], inputs: Encoding, out: Encoding) -> NDArray[np.int32]:
        op = fused.op
        assert op.weight is not None
        weight = self._table[op.weight]
        axis = self._graph.tensors[op.data_inputs[0]].channel_axis
        total = kernels.accumulate(op, codes, inputs, self._weight_codes(op), axis)
        channel = -1 if op.kind is OpKind.LINEAR else 1 if axis is None else axis
        bias = op.params.get(ParamRole.BIAS)
        scale = kernels.along(np.asarray(inputs.scale * weight.scale, np.float32), total.ndim, channel)
        if bias is not None:
            value = np.asarray(self._backend.read(self._model, [bias])[bias], np.float32)
            grid = self._bias_grid(op, bias)
            assert grid is not None
            codes = grid.quantize(value)
            added = kernels.along(codes.astype(np.float64), total.ndim, channel)
            self._note_peak(op, total + added)
            if op.kind is OpKind.LINEAR and (op.type != "Gemm" or total.ndim != 2):
                real = kernels.along(grid.dequantize(codes), total.ndim, channel)
                return kernels.requantize_with_bias(total, scale, real, out, fused.low, fused.high)
            total = total + added
        else:
            self._note_peak(op, total)
        return kernels.requantize(total, scale, out, fused.low, fused.high)

    def _note_peak(self, op: Op, total: NDArray[np.float64]) -> None:
        largest = max(float(total.max(initial=0)), -float(total.min(initial=0)))
        self.peaks[op.id] = max(self.peaks.get(op.id, 0.0), largest / ACCUMULATOR)

    def _constant(self, param: str) -> NDArray[np.int32]:
        if param not in self._weights:
            value = np.asarray(self._backend.read(self._model, [param])[param], np.float32)
            self._weights[param] = self._table[param].quantize(value)
        return self._weights[param]

    def _weight_codes(self, op: Op) -> NDArray[np.int32]:
        assert op.weight is not None
        if op.weight not in self._weights:
            encoding = self._table[op.weight]
            value = np.asarray(self._backend.read(self._model, [op.weight])[op.weight], np.float32)
            zero = encoding.spread(value.shape)[1]
            self._weights[op.weight] = encoding.quantize(value) - zero
        return self._weights[op.weight]


@dataclass(frozen=True)
class _IntegerSession:
    simulation: IntegerSimulation
    taps: tuple[Tap, ...]

    def run(self, batch: Batch) -> dict[Tap, NDArray[Any]]:
        """Dequantized tensors of one batch."""
        values = self.simulation.run(batch, [tap.tensor for tap in self.taps])
        return {tap: values[tap.tensor] for tap in self.taps}


def _code(encoding: Encoding, value: float) -> int:
    """The code of a bound, or the end of the grid."""
    if np.isinf(value):
        return encoding.grid.qmin if value < 0 else encoding.grid.qmax
    return int(encoding.quantize(np.asarray(value, np.float32)))
