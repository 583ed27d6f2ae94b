"""A capture against the model that it was made from: one rule for all frameworks.

A backend says how the user's model is run, how its capture is, and how what a run leaves behind is taken back. Both run
on the sample, and on another number of samples. Where they differ, the model is asked again, which tells a capture that
is wrong from a model that is never the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

from numpy.typing import NDArray

from bitwright.backend._alike import gap, in_rows, precision_of, trial_batches
from bitwright.errors import first_line

LARGE = 2**28
"""Bytes of parameters from which on a sample of one is not run as two."""

Run = Callable[[Sequence[Any]], Sequence[NDArray[Any]]]
"""From a batch, an array for each input, to all results that are tensors, flat and in the model's order."""


class Fault(Enum):
    """What a comparison has found."""

    DIFFERS = "the capture gives other results than the model for the same input"
    SIZE = "the capture gives other results than the model for another number of samples than it was captured with"
    CHANGES = (
        "the model gives other results when it is called again with the same input: it keeps Python state, or draws "
        "numbers in Python, which a capture holds as it was; keep state in the framework's variables, or hand it in "
        "and out"
    )
    DRAWS = (
        "the model draws random numbers in inference, so that no two calls give the same, and its capture can't be "
        "checked; leave out dropout and noise, or hand the numbers in"
    )
    UNCHECKED = "the model doesn't run on what its capture was to be checked with"


_ADVICE = "what it computes must follow from its inputs and variables alone, and from no Python state, mode or size"


_FAILS = "it fails where the model doesn't"


@dataclass(frozen=True)
class Finding:
    """What a comparison has found.

    Attributes:
        fault: its kind.
        batch: on which it showed.
        detail: which output differs, and how; of a model that doesn't run, what it says.
        fails: the capture doesn't run there, which whoever uses it so will see, rather than giving other results.
    """

    fault: Fault
    batch: Sequence[Any] = ()
    detail: str = ""
    fails: bool = False

    def __str__(self) -> str:
        told = f"{self.fault.value} ({self.detail})" if self.detail else self.fault.value
        return f"{told}; {_ADVICE}" if self.fault in (Fault.DIFFERS, Fault.SIZE) else told


def compare_capture(
    model: Run,
    capture: Run,
    specs: Sequence[tuple[Sequence[int | None], str]],
    sample: Sequence[Any] | None,
    *,
    dtypes: Iterable[str] = (),
    names: Sequence[str] = (),
    size: int = 0,
    fewest: int = 1,
    restore: Callable[[], object] = lambda: None,
    drew: Callable[[], bool] = lambda: False,
) -> Finding | None:
    """Whether a capture computes what the model does, on a sample and on another number of samples.

    Where the number of samples is free, they run on the first four, or on all where these don't do by themselves, and
    on one: on two if there is but one, and the model isn't large. Elsewhere the model runs on the same again. It runs
    once more to tell why they differ, and where it draws random numbers.

    Args:
        model: runs the user's model, in inference.
        capture: runs what was captured.
        specs: shape (None where free) and dtype of each input of the capture.
        sample: what they are run on, an array of numpy or of the framework for each input; without one, numbers are
            made up, which needn't suit the model.
        dtypes: of the tensors that the model computes, which say how exact it is.
        names: of the results, if they have any.
        size: bytes of the model's parameters.
        fewest: samples that the capture says it takes.
        restore: puts back what the framework keeps and a capture holds too (variables, states of random generators);
            called before each run. What is kept in Python isn't put back between the runs.
        drew: whether states of random generators have moved since `restore`.

    Returns:
        None if all is well.
    """
    precision, said = precision_of(dtypes), ""
    for batch in trial_batches(specs, sample, fewest):
        restore()
        try:
            expected = model(batch)
        except Exception as error:  # whatever a framework says of numbers that don't suit the model
            said = said or first_line(error)
            continue
        other = _of_another_size(batch, fewest, large=size > LARGE) if in_rows(specs, batch) else None
        return _Comparison(model, capture, precision, names, restore, drew).of(batch, expected, other)
    return Finding(Fault.UNCHECKED, (), said)


@dataclass(frozen=True)
class _Comparison:
    """What all of its runs share."""

    model: Run
    capture: Run
    precision: float
    names: Sequence[str]
    restore: Callable[[], object]
    drew: Callable[[], bool]

    def of(self, batch: Sequence[Any], expected: Sequence[NDArray[Any]], other: Sequence[Any] | None) -> Finding | None:
        if self.drew() and self._changes(batch, expected):  # without putting anything back
            return Finding(Fault.DRAWS, batch)
        wanted = None if other is None else self._where_it_runs(other)
        # The capture runs in the other order: what counts its calls as the model does would be in step with it.
        elsewhere = "" if other is None or wanted is None else self._differs(other, wanted)
        here = self._differs(batch, expected)
        if wanted is not None and not here and not elsewhere:
            return None
        self.restore()
        if self._changes(batch, expected):
            return Finding(Fault.CHANGES, batch)
        if here:
            return Finding(Fault.DIFFERS, batch, here)
        return Finding(Fault.SIZE, other or (), elsewhere, elsewhere.startswith(_FAILS)) if elsewhere else None

    def _where_it_runs(self, batch: Sequence[Any]) -> Sequence[NDArray[Any]] | None:
        """The model's results; None if it doesn't take so many samples."""
        self.restore()
        with suppress(Exception):
            return self.model(batch)
        return None

    def _differs(self, batch: Sequence[Any], expected: Sequence[NDArray[Any]]) -> str:
        self.restore()
        try:
            found = self.capture(batch)
        except Exception as error:
            return f"{_FAILS}: {first_line(error)}"
        return gap(expected, found, self.precision, self.names)

    def _changes(self, batch: Sequence[Any], expected: Sequence[NDArray[Any]]) -> bool:
        try:
            return bool(gap(expected, self.model(batch), self.precision))
        except Exception:
            return True  # it ran before


def _of_another_size(batch: Sequence[Any], fewest: int, *, large: bool) -> list[Any] | None:
    """The last sample alone, or the fewest that may be, which is cheap and which traces know least of; of a single one,
    two; of none, none."""
    if len(batch[0]) > fewest:
        return [x[-fewest:] for x in batch]
    return None if large or len(batch[0]) != 1 else [x[[0, 0]] for x in batch]
