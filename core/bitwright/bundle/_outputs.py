"""Outputs of an export's views over a dataset: signal to noise, and how often they give the same answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bitwright.backend import Feed, Session
from bitwright.bundle._crushed import CRUSHED_DB
from bitwright.data import Dataset, joined, samples_in
from bitwright.errors import InputError, ModelError
from bitwright.graph import Graph, OpKind, TensorId
from bitwright.progress import Progress, stage

PLAIN = "plain"
"""The view of a session with a runtime's default options, which may be refused."""
PAIRS = {"simulated_float": ("simulated", "float"), "integer_float": ("integer", "float"),
         "integer_simulated": ("integer", "simulated"), "plain_float": (PLAIN, "float")}  # fmt: skip
PLAIN_INTEGER = "plain_integer"
"""A pair of which only how many values differ is told."""


class OutputFigures(BaseModel):
    """One output of the model, over all samples.

    Attributes:
        name: the tensor.
        agreement: share of samples with equal argmax (of values that are equal, for integers and booleans):
            "simulated_float", "integer_float", "integer_simulated", "plain_float"; empty where a sample has one value,
            whose index says nothing.
        sqnr_db: signal to noise of the same pairs (second is the signal); null where the signal is nothing but zeros,
            or has no numbers.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    agreement: dict[str, float] = Field(default_factory=dict)
    sqnr_db: dict[str, float | None] = Field(default_factory=dict)


@dataclass
class OutputPair:
    """Sums of one output in two views.

    Attributes:
        signal, noise: Σ signal² and Σ (other − signal)² over finite values; noise is infinite where the views don't
            have their finite values in the same places.
        alike, count: samples with equal argmax, of how many.
        different, values: values that aren't equal, of how many.
        compared: whether there was anything.
        numeric: whether both views have numbers.
    """

    signal: float = 0.0
    noise: float = 0.0
    alike: int = 0
    count: int = 0
    different: int = 0
    values: int = 0
    compared: bool = False
    numeric: bool = True

    def add(self, other: NDArray[Any], signal: NDArray[Any], whole: bool) -> None:
        self.compared = True
        a, b = (np.asarray(v) for v in (other, signal))
        self.values += b.size
        if a.shape != b.shape or a.dtype.kind not in "biuf" or b.dtype.kind not in "biuf":
            self.noise = float("inf")
            self.numeric &= a.dtype.kind in "biuf" and b.dtype.kind in "biuf"
            self.different += b.size if a.shape != b.shape else int((a != b).sum())
            return
        equal = a == b
        if a.dtype.kind == b.dtype.kind == "f":
            equal |= np.isnan(a) & np.isnan(b)  # NaN in both is not a difference
        self.different += int(equal.size - np.count_nonzero(equal))
        mine, theirs = classes_of(a, whole), classes_of(b, whole)
        if b.dtype.kind != "f":
            mine, theirs = a.reshape(-1), b.reshape(-1)
        if mine is not None and theirs is not None:
            self.alike += int((mine == theirs).sum())
            self.count += mine.size
        x, y = b.astype(np.float64), a.astype(np.float64)
        known = np.isfinite(x)
        self.signal += float(np.square(x[known]).sum())
        error = np.square(y[known] - x[known]).sum()
        self.noise += float(error) if np.isfinite(error) and np.array_equal(known, np.isfinite(y)) else float("inf")

    @property
    def decibels(self) -> float | None:
        if self.noise == 0:
            return float("inf")
        if self.signal <= 0:
            return None
        return float("-inf") if np.isinf(self.noise) else 10 * float(np.log10(max(self.signal, 1e-300) / self.noise))


@dataclass
class OutputSums:
    """What `over_outputs` gathers.

    Attributes:
        first: the first output, whole, of each view.
        samples: how many were run.
        pairs: sums of each output, by `PAIRS`.
        problems: what is wrong in words.
    """

    first: dict[str, NDArray[Any]]
    samples: int
    pairs: dict[str, dict[str, OutputPair]]
    problems: list[str]

    def figures(self) -> list[OutputFigures]:
        """Of each output."""
        return [
            OutputFigures(
                name=tensor,
                agreement={k: p.alike / p.count for k, p in pairs.items() if p.count and k in PAIRS},
                sqnr_db={k: p.decibels for k, p in pairs.items() if p.compared and k in PAIRS},
            )
            for tensor, pairs in self.pairs.items()
        ]


def over_outputs(graph: Graph, sessions: Mapping[str, Session], dataset: Dataset, progress: Progress) -> OutputSums:
    """Figures of all outputs over a dataset; the first one is kept whole.

    An output that is an input is what was fed, in every view: no op of the target touches it.

    Args:
        graph: whose outputs.
        sessions: "float", "simulated", and "integer" and "plain" where there is such a runtime, compiled for the
            outputs. A plain session that refuses a batch is a problem, and isn't asked again.
        dataset: the samples.
        progress: where progress is shown.

    Raises:
        InputError: there are no samples.
    """
    outputs = list(dict.fromkeys(graph.outputs))
    parts: dict[str, list[NDArray[Any]]] = {view: [] for view in sessions}
    open_views = dict(sessions)
    pairings = {**PAIRS, PLAIN_INTEGER: (PLAIN, "integer")}
    known = {k: pair for k, pair in pairings.items() if all(view in sessions for view in pair)}
    pairs = {t: {k: OutputPair() for k in known} for t in outputs}
    problems: dict[str, None] = {}
    samples = 0
    with stage(progress, "Verify", dataset.samples):
        for batch in dataset:
            runs: dict[str, dict[TensorId, NDArray[Any]]] = {}
            for view, session in list(open_views.items()):
                try:
                    runs[view] = {t.tensor: np.asarray(x) for t, x in session.run(batch).items()}
                except (InputError, ModelError) as error:
                    if view != PLAIN:
                        raise
                    problems[f"a default session refuses the export: {error}"] = None
                    del open_views[view], parts[view]
                    known = {k: pair for k, pair in known.items() if PLAIN not in pair}
                    pairs = {t: {k: of[k] for k in known} for t, of in pairs.items()}
            passed = {t: np.asarray(batch[t]) for t in outputs if t in graph.inputs and t in batch}
            runs = {view: _whole(graph, outputs, {**run, **passed}) for view, run in runs.items()}
            for view, run in runs.items():
                if outputs[0] in run:
                    parts[view].append(run[outputs[0]])
            for tensor in outputs:
                real = runs["float"][tensor]
                if real.dtype.kind == "f" and np.isnan(real).any():
                    problems[f"the float output {tensor!r} holds NaN"] = None
                for view, run in runs.items():
                    if tensor not in run:
                        problems[f"the {view} output {tensor!r} isn't compared: there is no such tensor in it"] = None
                    if view != "float" and not _finite_alike(run.get(tensor), real):
                        problems[f"the {view} output {tensor!r} holds NaN or infinity"] = None
                for key, (other, signal) in known.items():
                    if tensor in runs[other] and tensor in runs[signal]:
                        pairs[tensor][key].add(runs[other][tensor], runs[signal][tensor], isinstance(batch, Feed))
            count = samples_in(batch)
            samples += count
            progress.advance(count)
    if not parts["float"]:
        raise InputError("there are no data to verify on")
    for tensor, of in pairs.items():
        crushed = of["simulated_float"].decibels if graph.tensors[tensor].is_float else None
        if crushed is not None and crushed < CRUSHED_DB:
            problems[f"output {tensor!r} is crushed: {crushed:.1f} dB of signal to quantization noise"] = None
    return OutputSums({view: whole_of(p) for view, p in parts.items() if p}, samples, pairs, list(problems))


def _whole(
    graph: Graph, outputs: Sequence[TensorId], run: dict[TensorId, NDArray[Any]]
) -> dict[TensorId, NDArray[Any]]:
    """A run, with outputs that are another's tensor under a second name (dropout), which a file need not have twice."""
    for tensor in outputs:
        source, op = tensor, graph.producer(tensor)
        while source not in run and op is not None and op.kind is OpKind.IDENTITY and op.data_inputs:
            source = op.data_inputs[0]
            op = graph.producer(source)
        if source in run:
            run[tensor] = run[source]
    return run


def _finite_alike(values: NDArray[Any] | None, real: NDArray[Any]) -> bool:
    if values is None or values.dtype.kind != "f" or real.dtype.kind != "f" or values.shape != real.shape:
        return True
    return bool(np.array_equal(np.isfinite(values), np.isfinite(real)))


def whole_of(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """One array of a tensor's batches; flat where their shapes differ beyond the samples."""
    try:
        return joined(parts)
    except ValueError:
        return np.concatenate([p.reshape(-1) for p in parts])


def in_shape(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    """A tensor that a runtime holds with neighbouring axes merged or split, in the model's shape.

    LiteRT's linear layers keep (samples, steps, features) as (samples · steps, features), its 1-D convolutions as
    (samples, 1, steps, features). None where the shapes aren't of that kind, so that the order of values isn't known.
    """
    if values.shape == shape:
        return values
    strides = [{int(np.prod(s[i:])) for i in range(len(s))} for s in (values.shape, shape)]
    merged = strides[0] <= strides[1] | {1} or strides[1] <= strides[0] | {1}
    return values.reshape(shape) if values.size == np.prod(shape) and merged else None


def classes_of(values: NDArray[Any], whole: bool = False) -> NDArray[Any] | None:
    """The largest value's index for each sample; None where there are no samples or values, or one value a sample.

    Args:
        values: of a batch, or several, joined.
        whole: they are of one whole feed, where (classes,) is one sample.
    """
    if values.ndim == 0 or values.size == 0 or values.dtype.kind not in "biuf":
        return None
    rows = values.reshape(1 if whole and values.ndim == 1 else len(values), -1)
    return None if rows.shape[1] == 1 else np.asarray(rows.argmax(axis=1))
