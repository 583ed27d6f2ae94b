"""Copies of a `QuantSim` that go ways of their own, for searches that try one thing after another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from bitwright.simulation._quantsim import QuantSim

S = TypeVar("S", bound="QuantSim")


def fork(
    sim: S,
    *,
    scheme: str | None = None,
    weight_scheme: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> S:
    """A simulation with the same model, encodings and history; what is done to one doesn't touch the other.

    The model isn't copied: backends never change one, they return new ones.

    Args:
        sim: stays as it is.
        scheme, weight_scheme: other calibration schemes, in force from the next `calibrate` on.
        overrides: further exceptions by op or site, on top of those that it has.

    Raises:
        InputError: an override names nothing, or no type; or a trained model wasn't taken over.
    """
    sim._require_taken("a search")
    twin = copy.copy(sim)
    twin.folded, twin.reports = dict(sim.folded), list(sim.reports)
    twin.overrides = {**sim.overrides, **(overrides or {})}
    twin.scheme = sim.scheme if scheme is None else scheme
    twin.weight_scheme = sim.weight_scheme if weight_scheme is None else weight_scheme
    twin._simulation, twin._training = None, None
    if twin.options != sim.options:
        twin.refresh()
    return twin
