"""Data that can hardly be what a network was trained on: nothing but zeros, pixels as they come, another scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Batch
from bitwright.data._dataset import Dataset

PIXELS = 64
"""Values that must have been seen before whole numbers from 0 to 255 are taken for pixels."""
FAR = 8.0
"""How many times larger than their grid values must be to be another scale, and not just rare."""
SMALL = 64.0
"""How many times smaller."""
CUT = 4.0
"""Values below zero that a grid from zero on cuts off are rare ones up to this part of its range."""


class ImplausibleDataWarning(UserWarning):
    """The data are valid, but hardly those that the network was trained on, so that ranges and accuracy mean little."""


@dataclass
class Seen:
    """What went by of one input.

    Attributes:
        low, high: the smallest and the largest value.
        count: how many values there were.
        whole: all are whole numbers.
        floating, rank: of its arrays.
    """

    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    whole: bool = True
    floating: bool = False
    rank: int = 0

    def add(self, values: NDArray[Any]) -> None:
        """Another batch. Values that aren't finite, as masks have, don't count."""
        self.floating, self.rank = values.dtype.kind == "f", max(self.rank, values.ndim)
        if values.size == 0 or values.dtype.kind not in "iuf":
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            return
        self.low, self.high, self.count = min(self.low, low), max(self.high, high), self.count + values.size
        # Only where they could be pixels: it is the one costly look.
        self.whole = self.whole and self.low >= 0 and self.high <= 255 and bool((values == np.rint(values)).all())

    @property
    def pixels(self) -> bool:
        """Whether these are the values of an image's file, 0 to 255, as floats."""
        return self.floating and self.rank >= 3 and self.whole and self.count >= PIXELS and self.high > 16


@dataclass
class Watching:
    """A dataset that hands out another's batches, and notes each once: in the first pass, or where that was given up
    midway, in the pass that goes further.

    Attributes:
        data: the other.
        seen: by input.
    """

    data: Dataset
    seen: dict[str, Seen] = field(default_factory=dict)
    _noted: int = 0

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.data):
            if number >= self._noted:
                self.note(batch)
                self._noted = number + 1
            yield batch

    def note(self, batch: Batch) -> None:
        """Note one batch."""
        for name, values in batch.items():
            self.seen.setdefault(name, Seen()).add(np.asarray(values))

    @property
    def samples(self) -> int | None:
        """How many there are, where that is known."""
        return self.data.samples

    def fingerprint(self) -> str:
        """That of the data."""
        return self.data.fingerprint()


def doubts_of_calibration(seen: Mapping[str, Seen], unscaled: Sequence[str]) -> list[str]:
    """What speaks against data as those to calibrate on.

    Args:
        seen: what went by, by input.
        unscaled: inputs that a layer with weights reads as they are: no op of the model scales them first.
    """
    known = {name: s for name, s in seen.items() if s.count}
    if known and all(s.low == s.high for s in known.values()) and any(s.count > 1 for s in known.values()):
        told = ", ".join(f"{name!r} is {s.low:g}" for name, s in known.items())
        return [f"the data are constant ({told} throughout), so that ranges set on them mean nothing"]
    least = float(np.finfo(np.float32).tiny)
    if known and all(max(-s.low, s.high) < least for s in known.values()):
        return [
            f"no value of the data is larger than {least:.1g}, below which all count as zero: are they scaled right?"
        ]
    return [
        f"input {name!r} holds whole numbers from {s.low:g} to {s.high:g}, as image files do, and the model doesn't "
        "scale them: if it was trained on normalized images, normalize these the same way"
        for name, s in known.items()
        if s.pixels and name in unscaled
    ]


def doubts_of_scale(seen: Mapping[str, Seen], ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """Where data have another scale than what a network was calibrated on.

    Args:
        seen: what went by, by input.
        ranges: of the inputs' grids.
    """
    found = []
    for name, (low, high) in ranges.items():
        s = seen.get(name)
        if s is None or not s.count:
            continue
        reach, own = max(-s.low, s.high), max(-low, high)
        # Images from -1 to 1 and from 0 to 1 have one scale, and still aren't preprocessed alike.
        below = low >= 0 and s.low < -own / CUT
        if own > 0 and (below or reach > FAR * own or 0 < reach < own / SMALL):
            found.append(
                f"input {name!r} spans {s.low:.4g} to {s.high:.4g}, but the network was calibrated on {low:.4g} to "
                f"{high:.4g}: are the data preprocessed as those to calibrate were?"
            )
    return found


def doubt_of_accuracy(top1: float, classes: int, samples: int) -> str:
    """What speaks against a float model's top-1: it is within two standard deviations of guessing, or below. Or "".

    Guessing among C classes is right 1/C of the time, with a deviation of √((1/C)(1 − 1/C)/n) over n samples. Few
    samples say nothing (64, or 8 a class where there are fewer than 8), and neither does a model of one output.

    Args:
        top1: a fraction.
        classes: C.
        samples: n.
    """
    if classes < 2 or not samples:
        return ""
    chance = 1 / classes
    enough = samples >= 8 * min(classes, 8)
    if not enough or top1 > chance + 2 * np.sqrt(chance * (1 - chance) / samples):
        return ""
    return (
        f"the float model's top-1 of {top1:.2%} on {samples} samples is what guessing among {classes} classes gives: "
        "labels, preprocessing or weights aren't the right ones, and what quantization changes can't be seen"
    )
