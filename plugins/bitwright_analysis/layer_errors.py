"""How far each op's output lies from the float model's, in the quantized network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Backend, Simulation, Tap
from bitwright.data import Dataset, samples_in
from bitwright.graph import LINEAR_KINDS, Graph, TensorId
from bitwright.placement import Plan
from bitwright.progress import Progress, stage
from bitwright_analysis.records import LayerError
from bitwright_analysis.scoring import Power, decibels

BUDGET = 192 * 2**20
"""Bytes of tensors that one network hands out for a batch; with more of them the data are gone through again."""


class TensorError:
    """Error of one tensor over all its values: nothing in it depends on how samples are batched."""

    def __init__(self, channel_axis: int | None) -> None:
        self._axis = channel_axis
        self.signal, self.noise = Power(), Power()
        self.largest = 0.0
        self._sums: NDArray[np.float64] | None = None

    def add(self, reference: NDArray[Any], other: NDArray[Any]) -> None:
        """Take one batch of both."""
        if np.size(reference) == 0:
            return
        error = np.asarray(other, np.float64) - reference
        self.signal.add(reference)
        self.noise.add(error)
        self.largest = max(self.largest, float(np.abs(error).max(initial=0.0)))
        if self._axis is not None and error.ndim > self._axis % error.ndim > 0:
            sums = np.moveaxis(error, self._axis, 1).reshape(len(error), error.shape[self._axis], -1).sum(axis=2)
        else:
            sums = error.reshape(len(error) if error.ndim else 1, -1).sum(axis=1, keepdims=True)
        for sample in sums:
            self._sums = sample.copy() if self._sums is None else self._sums + sample

    @property
    def mse(self) -> float:
        """Mean squared error."""
        return self.noise.total / max(self.noise.count, 1)

    @property
    def ratio(self) -> float:
        """Noise power over signal power; 0 where there is neither, 1 for noise on a signal that is zero."""
        if self.signal.total > 0:
            return self.noise.total / self.signal.total
        return float(self.noise.total > 0)

    @property
    def shift(self) -> float:
        """Share of the noise power that is a constant offset of each channel."""
        if self._sums is None or self.noise.total <= 0:
            return 0.0
        values = self.noise.count / len(self._sums)
        return float(np.square(self._sums).sum() / values / self.noise.total)


def layer_errors(
    backend: Backend[Any],
    model: Any,
    simulation: Simulation[Any],
    graph: Graph,
    plan: Plan,
    data: Dataset,
    progress: Progress,
) -> list[LayerError]:
    """A row for each op whose output is float and quantized, or that has a weight; in the order of the network."""
    tensors = [
        t
        for op in graph
        for t in op.outputs
        if t in graph.tensors
        and graph.tensors[t].is_float
        and (t in plan.quantized or op.kind in LINEAR_KINDS or t in graph.outputs)
    ]
    wanted = list(dict.fromkeys([*(t for t in graph.inputs if t in plan.quantized), *tensors]))
    errors = compare_tensors(backend, model, simulation, graph, wanted, data, progress)
    return [_row(graph, t, errors) for t in tensors]


def compare_tensors(
    backend: Backend[Any],
    model: Any,
    simulation: Simulation[Any],
    graph: Graph,
    tensors: Sequence[TensorId],
    data: Dataset,
    progress: Progress,
) -> dict[TensorId, TensorError]:
    """Float against simulated, tensor by tensor, in as many passes as memory asks for."""
    found = {t: TensorError(graph.tensors[t].channel_axis if t in graph.tensors else None) for t in tensors}
    parts = packed(graph, tensors, _batch_size(data))
    with stage(progress, "Comparing layers", len(parts) * data.samples if data.samples is not None else None):
        for part in parts:
            taps = [Tap(t) for t in part]
            reference, simulated = backend.session(model, taps), simulation.session(taps)
            for batch in data:
                expected, got = reference.run(batch), simulated.run(batch)
                for tap in taps:
                    found[tap.tensor].add(np.asarray(expected[tap]), np.asarray(got[tap]))
                progress.advance(samples_in(batch))
    return found


def packed(graph: Graph, tensors: Sequence[TensorId], batch_size: int, budget: int = BUDGET) -> list[list[TensorId]]:
    """Tensors in groups whose size for one batch stays within the budget (one that exceeds it alone is alone)."""
    groups: list[list[TensorId]] = []
    used = 0
    for t in tensors:
        shape = graph.tensors[t].shape if t in graph.tensors else None
        # Dimensions that nobody knows count as 64.
        size = 4 * batch_size * int(np.prod([64 if d is None else d for d in (shape or (1, 4096))[1:]], dtype=np.int64))
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(t)
        used += size
    return groups


def _batch_size(data: Dataset) -> int:
    return samples_in(next(iter(data), {}))


def _row(graph: Graph, tensor: TensorId, errors: dict[TensorId, TensorError]) -> LayerError:
    error, op = errors[tensor], graph.producer(tensor)
    assert op is not None
    inputs = [_behind(graph, t, errors) for t in op.data_inputs]
    worst = max((e.ratio for e in inputs if e is not None), default=0.0)
    sqnr, before = decibels(error.ratio), decibels(worst)
    return LayerError(
        tensor=tensor,
        op=op.id,
        type=op.type,
        mse=error.mse,
        sqnr_db=sqnr,
        max_error=error.largest,
        shift=error.shift,
        input_db=before,
        lost_db=before - sqnr if before is not None and sqnr is not None else None,
    )


def _behind(graph: Graph, tensor: TensorId, errors: dict[TensorId, TensorError]) -> TensorError | None:
    """The error of a tensor, or of the nearest one before it that was compared."""
    while tensor not in errors:
        producer = graph.producer(tensor)
        if producer is None or not producer.data_inputs:
            return None
        tensor = producer.data_inputs[0]
    return errors[tensor]
