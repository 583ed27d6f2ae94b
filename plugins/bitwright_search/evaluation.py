"""The user's evaluation: one number for a simulated network, higher is better; here, or on an executor."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.backend import Simulation, Tap, arrays_of
from bitwright.data import DataLike, Dataset, ImplausibleDataWarning, doubt_of_accuracy, labels_of
from bitwright.errors import InputError
from bitwright.metrics import Terms, Top1, metric_factory
from bitwright.runs import fingerprint
from bitwright.simulation import QuantSim


class Mode(StrEnum):
    """Which sites of a calibrated simulation are quantized."""

    FLOAT = "float"
    WEIGHTS = "weights only"
    ACTIVATIONS = "activations only"
    FULL = "quantized"


@dataclass(frozen=True)
class Score:
    """What an evaluation gave, higher is better.

    Attributes:
        value: the number.
        terms: the mean that it is, sample by sample; None of a function that returns a number alone.
    """

    value: float
    terms: Terms | None = None


@dataclass(frozen=True)
class Labelled:
    """Evaluation by top-1 accuracy: the share of samples whose largest output is at their label.

    Attributes:
        data: samples, in any form that `QuantSim.open` takes.
        labels: class indices, one a sample; an array, or a file (see `bitwright.data.labels`).
        batch_size: samples a batch, for arrays and files.
    """

    data: DataLike
    labels: Any
    batch_size: int = 8

    def opened(self, sim: QuantSim) -> Labelled:
        """The same with data and labels read and checked against the model and each other.

        Raises:
            InputError: they can't be used, or don't go together.
        """
        from bitwright.data import labels as read_labels

        dataset = sim.open(self.data, batch_size=self.batch_size)
        values = read_labels(self.labels) if isinstance(self.labels, str | Path) else self.labels
        return Labelled(dataset, labels_of(values, dataset, fixed=sim.fixed_batch), self.batch_size)

    def score(self, sim: QuantSim, simulation: Simulation[Any]) -> Score:
        """Top-1 of the first output, as a fraction."""
        tap = Tap(sim.graph.outputs[0])
        session = simulation.session([tap])
        metric = Top1(self.labels)
        for batch in sim.open(self.data, batch_size=self.batch_size):
            metric.add(arrays_of(batch), np.asarray(session.run(batch)[tap]))
        return Score(metric.value(), metric.terms)

    def identity(self) -> list[str]:
        """By the content of the opened data and labels.

        Raises:
            InputError: they aren't `opened`.
        """
        if not isinstance(self.data, Dataset):
            raise InputError("data have an identity once they are opened: call opened(sim) first")
        return ["top-1", self.data.fingerprint(), fingerprint.of_arrays([("labels", np.asarray(self.labels))])]


@dataclass(frozen=True)
class ByMetric:
    """Evaluation by a metric of `bitwright.metrics` that needs no labels; higher is better.

    Of perplexity the score is the mean log-likelihood of a token, −ln(perplexity): a loss of ln(1.08) is 1.08 × the
    float network's perplexity. Of kl it is −kl, in nats; the float network has 0.

    Attributes:
        data: samples, in any form that `QuantSim.open` takes.
        metric: "perplexity", "perplexity:INPUT", "kl" or "agreement".
        batch_size: samples a batch, for arrays and files.
        original: the network as it was opened, which kl and agreement compare with.
    """

    data: DataLike
    metric: str
    batch_size: int = 8
    original: QuantSim | None = None

    def opened(self, sim: QuantSim) -> ByMetric:
        """The same with data read and checked against a simulation, whose float model is what others are compared with.

        Raises:
            InputError: they can't be used, or there is no such metric.
        """
        compares = metric_factory(self.metric)().compares
        dataset = sim.open(self.data, batch_size=self.batch_size)
        return ByMetric(dataset, self.metric, self.batch_size, sim.fork() if compares else None)

    def score(self, sim: QuantSim, simulation: Simulation[Any]) -> Score:
        """The metric of the first output, its sign so that higher is better."""
        metric = metric_factory(self.metric)()
        tap = Tap(sim.graph.outputs[0])
        session, origin = simulation.session([tap]), self.original
        floating = origin.backend.session(origin.native, [tap]) if origin is not None else None
        for batch in sim.open(self.data, batch_size=self.batch_size):
            inputs = arrays_of(batch)
            wanted = None if floating is None else np.asarray(floating.run(batch)[tap])
            metric.add(inputs, np.asarray(session.run(batch)[tap]), wanted)
        name, value = self.metric.partition(":")[0], metric.value()
        if name == "perplexity":
            return Score(-math.log(value), -metric.terms)
        return Score(-value, -metric.terms) if name == "kl" else Score(value, metric.terms)

    def identity(self) -> list[str]:
        """By the metric and the content of the opened data; the network that is compared with is the run's own."""
        if not isinstance(self.data, Dataset):
            raise InputError("data have an identity once they are opened: call opened(sim) first")
        return [self.metric, self.data.fingerprint()]


@dataclass(frozen=True)
class FileFunction:
    """An evaluation function in a Python file, as ``file.py:function``; travels to other processes by its path."""

    path: str
    name: str

    @classmethod
    def parse(cls, text: str) -> FileFunction:
        """Read ``file.py:function`` and check that both exist.

        Raises:
            InputError: not of that form, no such file or function, or the file can't be run.
        """
        file, colon, name = text.rpartition(":")
        if not colon or not file.endswith(".py") or not name.isidentifier():
            raise InputError(f"{text!r} isn't of the form file.py:function")
        if not Path(file).is_file():
            raise InputError(f"there is no file {file!r}")
        found = cls(str(Path(file).resolve()), name)
        found.function()
        return found

    def identity(self) -> list[str]:
        """By the file's content."""
        return ["file", fingerprint.of_file(Path(self.path)), self.name]

    def function(self) -> Callable[[Any], Any]:
        """The function itself; the file is run once a process.

        Raises:
            InputError: it can't be run, or has no such function.
        """
        module = _module(self.path)
        function = getattr(module, self.name, None)
        if not callable(function):
            raise InputError(f"{self.path!r} has no function {self.name!r}")
        return function  # type: ignore[no-any-return]

    def __call__(self, model: Any) -> Any:
        """Evaluate a model."""
        return self.function()(model)


@functools.cache
def _module(path: str) -> Any:
    name = f"bitwright_evaluation_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As for a script: what it defines is found by its module's name (dataclasses and pickle do), and it may import what
    # lies beside it. At the end, so that nothing there takes the place of an installed module.
    sys.modules[name] = module
    if (folder := str(Path(path).parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise InputError(f"{path!r} can't be run: {type(error).__name__}: {error}") from error
    return module


Evaluate = Callable[[Any], Any] | Labelled | ByMetric
"""A function from the native simulated model to a number, labelled data for top-1, or data for a metric."""


def read_evaluate(given: Any, sim: QuantSim) -> Evaluate:
    """What the user gave as `evaluate`, checked: a function, ``(data, labels)``, a `Labelled` or a `ByMetric`.

    Raises:
        InputError: none of these, or data and labels don't fit the model.
    """
    if isinstance(given, tuple) and len(given) == 2:
        given = Labelled(*given)
    if isinstance(given, Labelled | ByMetric):
        return given.opened(sim)
    if not callable(given):
        raise InputError(
            f"evaluate={given!r}: give a function that takes the simulated model and returns a number, or "
            "(data, labels) for top-1"
        )
    return given  # type: ignore[no-any-return]


def simulation_in(sim: QuantSim, mode: Mode) -> Simulation[Any]:
    """A calibrated network with all, none, or only one kind of its sites quantized."""
    if mode is Mode.FULL:
        return sim.simulation
    simulation = sim.backend.simulate(sim.native, sim.plan, sim.table)
    kept = {Mode.WEIGHTS: sim.plan.parameters, Mode.ACTIVATIONS: sim.plan.activations}.get(mode, ())
    # Int32 biases are derived from both; with one of them in float they are float too.
    roots = {sim.plan.root(s) for s in sim.plan.quantized} - set(kept)
    simulation.set(dict.fromkeys(sorted(roots)))
    return simulation


def measure(evaluate: Evaluate, sim: QuantSim, mode: Mode) -> tuple[Score, float]:
    """(score, seconds) of a calibrated network.

    Raises:
        InputError: the evaluation returned no finite number, nor an array with one for each sample.
    """
    begin = time.perf_counter()
    simulation = simulation_in(sim, mode)
    if isinstance(evaluate, Labelled | ByMetric):
        score = evaluate.score(sim, simulation)
    else:
        score = _read(evaluate(simulation.model))
    if not math.isfinite(score.value):
        raise InputError(f"evaluate returned {score.value}; it must return a finite number, higher is better")
    return score, time.perf_counter() - begin


def _read(value: Any) -> Score:
    """What a user's function returned: a number, or an array with one a sample, whose mean it is then."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.size > 1 and value.dtype.kind in "fiub":
        terms = Terms.single(value.astype(np.float64))
        return Score(terms.mean, terms)
    try:
        return Score(float(value))
    except (TypeError, ValueError):
        raise InputError(
            f"evaluate returned {value!r}; it must return a number, higher is better, or a numpy array with a score "
            "for each sample"
        ) from None


def warn_of_guessing(evaluate: Evaluate, sim: QuantSim, score: Score) -> None:
    """Warn (`ImplausibleDataWarning`) where the float network's top-1 is what guessing gives."""
    shape = sim.graph.tensors[sim.graph.outputs[0]].shape
    if not isinstance(evaluate, Labelled) or shape is None:
        return
    sizes = [n for n in shape[1:] if n is not None]
    classes = math.prod(sizes) if len(sizes) == len(shape) - 1 else 0
    if doubt := doubt_of_accuracy(score.value, classes, len(evaluate.labels)):
        warnings.warn(doubt, ImplausibleDataWarning, stacklevel=2)


def measure_saved(directory: str, evaluate: Evaluate, mode: str) -> tuple[Score, float]:
    """`measure` of a saved simulation: what is sent to an executor, so all of it travels by value or by path."""
    return measure(evaluate, QuantSim.load(directory), Mode(mode))
