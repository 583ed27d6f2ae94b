"""What a setting of a simulation is worth: the noise at its outputs, top-1 on labels, or the user's own evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from bitwright import metrics
from bitwright.backend import Backend, Simulation, Tap, arrays_of
from bitwright.data import CutCache, Dataset
from bitwright.errors import InputError
from bitwright.graph import Graph

CACHE_BYTES = 256 * 2**20
"""Memory for the float model's outputs; what exceeds it goes to disk."""


class Judge(Protocol):
    """Scores one setting of a simulation."""

    name: str

    def __call__(self, simulation: Simulation[Any]) -> float:
        """The figure; for `OutputNoise` relative noise power, otherwise a score."""


class Power:
    """Σ v² in float64, sample by sample in order, so that the sum doesn't depend on how samples are batched."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, values: NDArray[Any]) -> None:
        """Take one batch; the first axis is samples."""
        if np.size(values) == 0:
            return
        rows = np.asarray(values, np.float64).reshape(len(values) if np.ndim(values) else 1, -1)
        for sample in np.square(rows).sum(axis=1).tolist():
            self.total += sample
        self.count += rows.size


class OutputNoise:
    """Noise power of the outputs relative to the float model's signal; the mean over float outputs.

    Sums are over all values of all samples in float64 (see `Power`). Outputs that are integers, or zero everywhere,
    don't count.

    Args:
        backend, model, graph: the float model.
        data: what both models run on.

    Raises:
        InputError: no output is of floats, so that only an evaluation can judge the model.
    """

    name = "SQNR"

    def __init__(self, backend: Backend[Any], model: Any, graph: Graph, data: Dataset) -> None:
        self._taps = [Tap(t) for t in graph.outputs if t not in graph.tensors or graph.tensors[t].is_float]
        if not self._taps:
            raise InputError("the model has no float output to measure noise at; give `evaluate`")
        self._data = data
        self._cache = CutCache(CACHE_BYTES)
        self._signal = [Power() for _ in self._taps]
        session = backend.session(model, self._taps)
        for batch in data:
            found = session.run(batch)
            outputs = {tap.tensor: np.asarray(found[tap]) for tap in self._taps}
            for tap, power in zip(self._taps, self._signal, strict=True):
                power.add(outputs[tap.tensor])
            self._cache.append(outputs)
        if not any(p.count for p in self._signal):
            raise InputError("the data are empty; give at least one sample")

    def __call__(self, simulation: Simulation[Any]) -> float:
        """Relative noise power of the simulation as it is set now."""
        noise = [Power() for _ in self._taps]
        session = simulation.session(self._taps)
        for batch, reference in zip(self._data, self._cache, strict=True):
            found = session.run(batch)
            for tap, power in zip(self._taps, noise, strict=True):
                power.add(np.asarray(found[tap], np.float64) - reference[tap.tensor])
        ratios = [n.total / s.total for n, s in zip(noise, self._signal, strict=True) if s.total > 0]
        return float(np.mean(ratios)) if ratios else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Free what the float outputs take."""
        self._cache.close()


class Top1:
    """Share of samples whose largest score, in the first output, is at the label.

    Args:
        graph: the float model's.
        data: samples.
        labels: class indices, one a sample (see `samples.labels_of`).
    """

    name = "top-1"

    def __init__(self, graph: Graph, data: Dataset, labels: NDArray[Any]) -> None:
        self._tap, self._data, self._labels = Tap(graph.outputs[0]), data, labels

    def __call__(self, simulation: Simulation[Any]) -> float:
        """Top-1 of the simulation as it is set now.

        Raises:
            InputError: there are more or fewer samples than labels, or the output isn't (samples, classes).
        """
        session, metric = simulation.session([self._tap]), metrics.Top1(self._labels)
        for batch in self._data:
            metric.add(arrays_of(batch), np.asarray(session.run(batch)[self._tap]))
        return metric.value()


class Evaluation:
    """The user's own function of the native model."""

    def __init__(self, evaluate: Callable[[Any], Any]) -> None:
        self._evaluate = evaluate
        self.name = str(getattr(evaluate, "__name__", type(evaluate).__name__)).strip("<>")

    def __call__(self, simulation: Simulation[Any]) -> float:
        """What it gives for the simulation as it is set now.

        Raises:
            InputError: the result is not a finite number.
        """
        result = self._evaluate(simulation.model)
        try:
            value = float(result)
        except (TypeError, ValueError):
            raise InputError(f"{self.name} returned {type(result).__name__}; it must return one number") from None
        if not math.isfinite(value):
            raise InputError(f"{self.name} returned {value}; it must return a finite number")
        return value


def decibels(ratio: float) -> float | None:
    """Relative noise power as SQNR; None for no noise."""
    return None if ratio <= 0 else -10 * math.log10(ratio)
