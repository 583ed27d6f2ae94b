"""Where an output's classes are: on the last axis, behind samples; what has no such axis says nothing of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.backend import Feed
from bitwright.errors import InputError

Values = NDArray[Any]


def class_scores(name: str, outputs: Values, *, whole: bool = False, finite: bool = True) -> Values:
    """(samples, classes) of an output with one class index a sample, which may have further axes of length 1.

    Args:
        name: what asks, for messages.
        outputs: of a batch, or of several, joined.
        whole: they are of one whole feed (`backend.Feed`), where (classes,) is one sample.
        finite: refuse NaN and infinity too.

    Raises:
        InputError: an output of another shape, of one class, or with values that are refused.
    """
    require_classes(name, outputs, whole=whole)
    rows = outputs[None] if outputs.ndim == 1 else outputs
    if sum(n > 1 for n in rows.shape[1:]) > 1:
        raise InputError(
            f"{name}: the output has shape {outputs.shape}, several axes behind the first, so that there isn't one "
            "class a sample; it takes (samples, classes)"
        )
    scores = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    require_several(name, outputs, scores.shape[1])
    if finite:
        require_finite(name, scores)
    return scores


def require_classes(name: str, outputs: Values, *, whole: bool) -> None:
    """Refuse outputs without an axis of classes behind that of samples.

    Args:
        name: what asks, for messages.
        outputs: of a batch.
        whole: the batch is one whole feed, which has no axis of samples, so that (classes,) will do.
    """
    if outputs.dtype.kind not in "biuf":
        raise InputError(f"{name}: the output holds {outputs.dtype} values; it takes numbers")
    if outputs.ndim < (1 if whole else 2):
        raise InputError(
            f"{name}: the output has shape {outputs.shape}, without an axis of classes behind that of samples; it "
            "takes (samples, classes): choose such a tensor, or evaluate with a function of your own"
        )


def require_several(name: str, outputs: Values, classes: int) -> None:
    """Refuse outputs of one class, whose largest is always the first."""
    if classes < 2:
        raise InputError(
            f"{name}: the output has shape {outputs.shape}, one class, whose largest value is always at 0; it takes "
            "outputs of several classes"
        )


def require_finite(name: str, logits: Values) -> None:
    """Refuse NaN and infinity."""
    if not np.isfinite(logits).all():
        raise InputError(f"{name}: the outputs hold NaN or infinity")


def samples_of(inputs: Mapping[str, Values], kept: NDArray[np.bool_]) -> int:
    """Samples that positions of this shape are of: a whole feed is one."""
    return 1 if isinstance(inputs, Feed) or not kept.ndim else len(kept)
