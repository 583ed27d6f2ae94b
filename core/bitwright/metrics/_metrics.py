"""What networks are scored by: perplexity, divergence from the float network, agreement with it, accuracy.

Each metric takes batches one after another and keeps sums alone, so that logits are never held beyond a batch. Sums are
float64, and there is one for each sample, which says how sure a value is. Classes lie on the last axis of an output:
(samples, classes), or (samples, positions, classes) of language models, where every position counts for itself. A batch
that is a whole feed (`backend.Feed`) has no axis of samples: it is one, and its outputs are (classes,) or
(positions, classes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Feed, class_indices
from bitwright.errors import InputError, unknown_name
from bitwright.metrics._classes import class_scores, require_classes, require_finite, require_several, samples_of
from bitwright.metrics._terms import Terms

Values = NDArray[Any]
Inputs = Mapping[str, Values]
_ELEMENTS = 1 << 22
"""Logits that are worked on at a time, in float64."""
_ROWS = 16
"""Positions that look like probabilities before the data's end is not waited for: no logits do by chance."""


@dataclass(frozen=True)
class Figure:
    """A metric's value.

    Attributes:
        metric: its name.
        simulated: of the simulated network.
        float_model: of the float network; None where the metric compares the two.
        count: positions (or samples) that it is the mean of.
        error: standard error of what the simulation loses against the float network on the same samples, which are
            taken as independent: of a difference of means, of perplexity of the ratio's logarithm. None for one sample.
    """

    metric: str
    simulated: float
    float_model: float | None
    count: int
    error: float | None = None


class Metric(Protocol):
    """Sums over batches of one network.

    Attributes:
        compares: it compares with the float network, whose outputs `add` then needs.
    """

    compares: bool

    def add(self, inputs: Inputs, outputs: Values, reference: Values | None) -> None:
        """Take a batch: the model's inputs (a `backend.Feed` where that is what the data hold), an output, and what the
        float network makes of the same inputs."""

    def value(self) -> float:
        """The value of all batches.

        Raises:
            InputError: nothing was counted.
        """

    @property
    def count(self) -> int:
        """Positions or samples counted so far."""

    @property
    def terms(self) -> Terms:
        """What the mean consists of, by sample; of perplexity it is the mean before exp, cross-entropy."""


class _Mean:
    """A mean over positions."""

    compares = False
    shares = False
    """Whether each position has 0 or 1."""

    def __init__(self, name: str) -> None:
        self.name, self.total, self._count = name, 0.0, 0
        self._sums: list[NDArray[np.float64]] = []
        self._counts: list[NDArray[np.int64]] = []

    @property
    def count(self) -> int:
        return self._count

    @property
    def terms(self) -> Terms:
        return Terms(
            tuple(float(v) for batch in self._sums for v in batch),
            tuple(int(n) for b in self._counts for n in b),
            shares=self.shares,
        )

    def _begin(self, samples: int) -> None:
        """A batch of so many samples."""
        self._sums.append(np.zeros(samples))
        self._counts.append(np.zeros(samples, np.int64))

    def _take(self, values: Values, samples: NDArray[np.integer]) -> None:
        """Values of the batch, and the sample in it that each is of."""
        self.total += float(np.sum(values, dtype=np.float64))
        self._count += int(values.size)
        places = len(self._sums[-1])
        self._sums[-1] += np.bincount(samples, np.asarray(values, np.float64).ravel(), places)
        self._counts[-1] += np.bincount(samples, minlength=places)

    def value(self) -> float:
        if self._count == 0:
            raise InputError(f"{self.name}: the data hold nothing to count: every position is masked, or there is none")
        return self.total / self._count


class _OfLogits(_Mean):
    """A mean of what softmax makes of logits; outputs on which a softmax has been are refused."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._suspects: int | None = 0  # positions seen, as long as all are probabilities

    def _doubt(self, outputs: Values) -> None:
        """Look at a batch's outputs, (..., classes), of the float network where there is one.

        Raises:
            InputError: there is one class, or all positions so far are probabilities.
        """
        if outputs.shape[-1] == 1:
            raise InputError(
                f"{self.name}: the output has shape {outputs.shape}, one class on its last axis, where a softmax "
                "always gives 1; it takes logits of several classes"
            )
        if self._suspects is None or not outputs.size:
            return
        self._suspects = self._suspects + outputs.size // outputs.shape[-1] if are_probabilities(outputs) else None
        if (self._suspects or 0) >= _ROWS:
            self._refuse()

    def _refuse(self) -> None:
        raise InputError(
            f"{self.name}: the outputs are probabilities (none is negative, and each position's add up to 1), and it "
            "takes logits: name the tensor ahead of the softmax, as `output` of measure(), or give the network without "
            "its last softmax; agreement and top1 take either"
        )

    def value(self) -> float:
        if self._suspects:
            self._refuse()
        return super().value()


class Perplexity(_OfLogits):
    """exp of the mean cross-entropy of each next token: logits (n, length, vocabulary), tokens (n, length) an input.

    Args:
        tokens: the input that holds token ids; None finds it, see `token_input`.
    """

    def __init__(self, tokens: str | None = None) -> None:
        super().__init__("perplexity")
        self.tokens = tokens

    def add(self, inputs: Inputs, outputs: Values, reference: Values | None = None) -> None:
        """See `Metric.add`; positions whose token or predecessor is masked don't count."""
        if outputs.ndim != 3:
            raise InputError(
                f"perplexity: the output has shape {outputs.shape}; it takes logits (samples, length, vocabulary)"
            )
        if isinstance(inputs, Feed) and len(outputs) > 1:
            raise InputError(
                f"perplexity: the output has shape {outputs.shape} and the data are whole feeds, whose first axis "
                "isn't samples, so that it isn't known which axis is the text's length; evaluate by a function"
            )
        require_classes(self.name, outputs, whole=False)
        self._doubt(outputs)
        ids = inputs[self.tokens or token_input(inputs, outputs.shape[:2])]
        if ids.shape != outputs.shape[:2] or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"perplexity: tokens are {ids.dtype} {ids.shape}; logits {outputs.shape} ask for integers "
                f"{outputs.shape[:2]}"
            )
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < outputs.shape[2]:
            raise InputError(f"perplexity: token ids from {ids.min()} to {ids.max()}, of {outputs.shape[2]} logits")
        mask = counted(inputs, outputs.shape[:2])
        kept = mask[:, 1:] & mask[:, :-1]
        self._begin(count := samples_of(inputs, kept))
        for samples, logs, (targets,) in _log_probabilities(self.name, outputs[:, :-1], kept, count, ids[:, 1:]):
            self._take(-np.take_along_axis(logs, targets[:, None], axis=-1), samples)

    def value(self) -> float:
        """exp of the mean."""
        return float(np.exp(super().value()))


class Divergence(_OfLogits):
    """Mean over positions of the Kullback–Leibler divergence of the network's distribution from the float network's,
    Σ p ln(p / q) in nats; softmax over the last axis."""

    compares = True

    def __init__(self) -> None:
        super().__init__("kl")

    def add(self, inputs: Inputs, outputs: Values, reference: Values | None) -> None:
        """See `Metric.add`; masked positions don't count."""
        assert reference is not None
        require_classes(self.name, outputs, whole=isinstance(inputs, Feed))
        self._doubt(reference)
        kept = counted(inputs, outputs.shape[:-1])
        self._begin(count := samples_of(inputs, kept))
        for samples, logs, (rows,) in _log_probabilities(self.name, outputs, kept, count, reference):
            wanted = _log_softmax(self.name, rows)
            p = np.exp(wanted)
            terms = np.where(p > 0, p * (np.where(p > 0, wanted, 0.0) - logs), 0.0)
            self._take(terms.sum(axis=-1), samples)


class Agreement(_Mean):
    """The share of positions at which both networks' largest logits have the same index."""

    compares = True
    shares = True

    def __init__(self) -> None:
        super().__init__("agreement")

    def add(self, inputs: Inputs, outputs: Values, reference: Values | None) -> None:
        """See `Metric.add`; masked positions don't count."""
        assert reference is not None
        require_classes(self.name, outputs, whole=isinstance(inputs, Feed))
        require_several(self.name, outputs, outputs.shape[-1])
        kept = counted(inputs, outputs.shape[:-1])
        require_finite(self.name, outputs)
        require_finite(self.name, reference)
        self._begin(count := samples_of(inputs, kept))
        same = np.asarray(outputs.argmax(axis=-1) == reference.argmax(axis=-1))
        self._take(same[kept], np.flatnonzero(kept) // _positions(kept, count))


class Top1(_Mean):
    """The share of samples whose largest output is at their label.

    Args:
        labels: class indices, one a sample, in the order of the data (see `backend.class_indices`). Of whole feeds one
            for each row of the output, or for each feed where that is (classes,).

    Raises:
        InputError: labels aren't that.
    """

    shares = True

    def __init__(self, labels: Sequence[int] | NDArray[Any]) -> None:
        super().__init__("top1")
        self.labels = class_indices(labels, self.name)

    def add(self, inputs: Inputs, outputs: Values, reference: Values | None = None) -> None:
        """See `Metric.add`."""
        scores = class_scores(self.name, outputs, whole=isinstance(inputs, Feed))
        found = scores.argmax(axis=1)
        expected = self.labels[self.count : self.count + len(found)]
        if len(expected) != len(found):
            raise InputError(f"top1: there are {len(self.labels)} labels, but more samples: give one label a sample")
        if (highest := int(expected.max(initial=0))) >= scores.shape[1]:
            raise InputError(f"top1: a label is {highest}, of outputs with the classes 0 to {scores.shape[1] - 1}")
        samples = np.zeros(len(found), int) if isinstance(inputs, Feed) else np.arange(len(found))
        self._begin(1 if isinstance(inputs, Feed) else len(found))
        self._take(found == expected, samples)

    def value(self) -> float:
        """The share; refused where labels are left over."""
        if self.count != len(self.labels):
            raise InputError(f"top1: there are {len(self.labels)} labels for {self.count} samples")
        return super().value()


METRICS: Mapping[str, str] = {
    "perplexity": "exp of the mean next-token cross-entropy; perplexity:INPUT names the input with the tokens",
    "kl": "mean divergence from the float network's distribution, in nats",
    "agreement": "share of positions with the float network's largest logit",
    "top1": "share of samples whose largest output is at their label",
}
"""Names, and what they mean."""


def metric_factory(text: str, labels: Sequence[int] | NDArray[Any] | None = None) -> Callable[[], Metric]:
    """What makes a metric, of its name: "perplexity", "perplexity:input_ids", "kl", "agreement", "top1".

    Args:
        text: the name, with a setting behind a colon.
        labels: for "top1".

    Raises:
        InputError: no such metric, a setting that it doesn't have, or no labels.
    """
    name, _, setting = text.partition(":")
    if name not in METRICS:
        raise InputError(f"there is no metric {name!r}{unknown_name(name, METRICS)}; there are {', '.join(METRICS)}")
    if setting and name != "perplexity":
        raise InputError(f"metric {name!r} has no setting, but {text!r} gives one")
    if name == "top1":
        if labels is None:
            raise InputError("metric 'top1' needs labels: class indices, one a sample")
        return lambda: Top1(labels)
    if name == "perplexity":
        return lambda: Perplexity(setting or None)
    return Divergence if name == "kl" else Agreement


def are_probabilities(outputs: Values) -> bool:
    """Whether outputs (..., classes) are all at least 0 and add up to 1 over classes, as no network's logits do."""
    return bool(outputs.min(initial=0) >= 0 and np.allclose(outputs.sum(axis=-1, dtype=np.float64), 1, atol=1e-2))


def token_input(inputs: Inputs, shape: tuple[int, ...]) -> str:
    """The integer input of a shape that holds tokens: the only one, or the only one that isn't a mask, positions or
    types by its name.

    Raises:
        InputError: there is none, or several could be meant.
    """
    fitting = [n for n, v in inputs.items() if np.issubdtype(v.dtype, np.integer) and v.shape == tuple(shape)]
    named = [n for n in fitting if not any(word in n.lower() for word in ("mask", "position", "type"))]
    found = fitting if len(fitting) == 1 else named
    if len(found) != 1:
        what = "no integer input has" if not found else f"{' and '.join(map(repr, found))} have"
        raise InputError(f"perplexity: {what} the logits' shape {tuple(shape)}; name the tokens: perplexity:INPUT")
    return found[0]


def counted(inputs: Inputs, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Positions that count: all but those that an input called a mask, of the same shape, has zeros at."""
    counted = np.ones(shape, bool)
    positions = len(shape) > (0 if isinstance(inputs, Feed) else 1)
    for name, values in inputs.items():
        if "mask" in name.lower() and values.shape == tuple(shape) and positions:
            counted &= values != 0
    return counted


def _positions(kept: NDArray[np.bool_], samples: int) -> int:
    """Of a sample."""
    return max(1, kept.size // max(1, samples))


def _log_probabilities(
    name: str, logits: Values, kept: NDArray[np.bool_], samples: int, *beside: Values
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], list[Values]]]:
    """Log-softmax of the positions kept, a piece at a time: their samples, it, and the same positions of others."""
    flat = logits.reshape(-1, logits.shape[-1])
    index = np.flatnonzero(kept.reshape(-1))
    others = [v.reshape(len(flat), *v.shape[kept.ndim :]) for v in beside]
    step = max(1, _ELEMENTS // max(1, flat.shape[-1]))
    for begin in range(0, len(index), step):
        rows = index[begin : begin + step]
        yield rows // _positions(kept, samples), _log_softmax(name, flat[rows]), [v[rows] for v in others]


def _log_softmax(name: str, logits: Values) -> NDArray[np.float64]:
    require_finite(name, logits)
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
