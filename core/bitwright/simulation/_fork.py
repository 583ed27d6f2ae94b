"""States that go ways of their own, for searches that try one thing after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bitwright.simulation._state import rebuilt
from bitwright.simulation._training import require_taken
from bitwright.state import SimState


def fork(
    state: SimState,
    *,
    scheme: str | None = None,
    weight_scheme: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    wanted_by: str = "a search",
) -> SimState:
    """The same model, encodings and history, without a model in training; see `QuantSim.fork`.

    Args:
        state: stays as it is.
        scheme, weight_scheme: other calibration schemes, in force from the next calibration on.
        overrides: further exceptions by op or site, on top of those that it has.
        wanted_by: what the fork is for, as the error names it.

    Raises:
        InputError: an override names nothing, or no type; or a trained model wasn't taken over.
    """
    require_taken(state, wanted_by)
    twin = replace(
        state,
        scheme=state.scheme if scheme is None else scheme,
        weight_scheme=state.weight_scheme if weight_scheme is None else weight_scheme,
        overrides={**state.overrides, **(overrides or {})},
        training=None,
    )
    return twin if twin.options == state.options else rebuilt(twin)
