"""Model preparation, which nothing needs here."""

from __future__ import annotations

import warnings
from typing import Any


class NotNeeded(UserWarning):
    """A step of AIMET's workflow that changes nothing here."""


def prepare_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model itself: graphs are captured, so functional ops, reused layers and subclassed models stay as they are.

    Warns:
        NotNeeded: always.
    """
    warnings.warn(
        "prepare_model has nothing to do: bitwright captures the model's graph as it is, with functional ops and "
        "reused layers; the model is returned unchanged",
        NotNeeded,
        stacklevel=2,
    )
    return model
