"""One site of a simulation by its name: `sim["layer1.0.conv1.weight"]`."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Self

from bitwright.errors import EncodingError, InputError, unknown_name
from bitwright.graph import Graph
from bitwright.grids import Encoding, PerTensor, encoding_from_range
from bitwright.placement import Decision, Plan, SiteId
from bitwright.simulation._set_precision import set_type
from bitwright.simulation._state import with_encodings
from bitwright.state import SimState


class SiteHandle:
    """A tensor or parameter of a simulation, and what can be done to its quantizer.

    It holds nothing of its own: each call reads the simulation as it is then, and changes it as a whole or, where it
    fails, not at all. Sites that share a grid change together.

    Args:
        site: a site of the simulation's plan.
        state: gives the simulation's state as it is now.
        become: lets the simulation take another state over.
    """

    def __init__(self, site: SiteId, state: Callable[[], SimState], become: Callable[[SimState], object]) -> None:
        self.id, self._state, self._become = site, state, become

    @property
    def decision(self) -> Decision:
        """What the plan does here: a `QuantSpec`, or `SharedWith`, `Derived` or `Float` with the reason."""
        return self._state().plan[self.id].decision

    @property
    def encoding(self) -> Encoding | None:
        """The encoding that holds here, ties followed; None before calibration and where there is none."""
        return self._state().encodings.get(self._state().plan.root(self.id))

    @property
    def frozen(self) -> bool:
        """Whether later calibrations leave the encoding alone."""
        found = self.encoding
        return found is not None and found.frozen

    def set(
        self,
        what: Encoding | str | int | None = None,
        *,
        low: float | None = None,
        high: float | None = None,
        freeze: bool = True,
    ) -> Self:
        """Give it another encoding, range or type.

        Args:
            what: an encoding; or a type such as "int4" or 16, after which it needs `calibrate` again.
            low, high: a range instead, for a grid of the planned type over it (widened to hold 0).
            freeze: later calibrations keep the encoding or range.

        Raises:
            InputError: neither or both are given, not a type, or the range is empty.
            EncodingError: the site takes no encoding of this kind.
        """
        ranged = low is not None and high is not None
        if (what is None) != ranged or (not ranged and (low is not None or high is not None)):
            raise InputError(f"{self.id!r}: give an encoding, a type such as 'int4', or both low= and high=")
        if isinstance(what, Encoding):
            self._install(what, freeze=freeze)
        elif what is not None:
            self._become(set_type(self._state(), self.id, what))
        else:
            assert low is not None and high is not None
            self._install(self._over(low, high), freeze=freeze)
        return self

    def freeze(self, frozen: bool = True) -> Self:
        """Keep the encoding through later calibrations; with False, let them replace it again.

        Raises:
            EncodingError: there is none yet, or the site takes none.
        """
        found = self.encoding
        if found is None:
            raise EncodingError(f"{self.id!r} has no encoding to freeze: {why_none(self._state(), self.id)}")
        self._install(found.with_(frozen=frozen, kept=found.kept and frozen, held_by=""))
        return self

    def float(self) -> Self:
        """Leave it in float.

        Raises:
            InputError: something stands against it.
        """
        self._become(set_type(self._state(), self.id, "float"))
        return self

    def _install(self, encoding: Encoding, *, freeze: bool = False) -> None:
        state = self._state()
        self._become(with_encodings(state, {state.plan.root(self.id): encoding}, freeze=freeze))

    def _over(self, low: builtins.float, high: builtins.float) -> Encoding:
        spec = self._state().plan.spec(self.id)
        if spec is None:
            raise EncodingError(f"{self.id!r} takes no range: {why_none(self._state(), self.id)}")
        if not isinstance(spec.granularity, PerTensor):
            raise EncodingError(
                f"{self.id!r} has a scale for each channel or block, so one range doesn't say its grid; set an encoding"
            )
        if not low < high:
            raise InputError(f"{self.id!r}: the range from {low:g} to {high:g} is empty")
        return encoding_from_range(spec, low, high, source="manual")

    def __repr__(self) -> str:
        row = self._state().plan.row(self.id)
        found = self.encoding
        told = f"{row.bits} {row.granularity}".strip()
        if found is not None and found.is_fixed:
            told += f", {float(found.minimum.min()):.4g} to {float(found.maximum.max()):.4g}"
        if row.decision in ("float", "fused"):
            return f"<{self.id}: {row.decision}, {row.reason}>"
        state = "frozen" if self.frozen else "calibrated" if found is not None else why_none(self._state(), self.id)
        return f"<{self.id}: {told}, {state}>"


def site_named(graph: Graph, plan: Plan, name: object) -> SiteId:
    """The site that a name means.

    Raises:
        InputError: there is none; with the nearest names, or the sites of the op that is called so.
    """
    if not isinstance(name, str):
        raise InputError(f"a site is named by a text, such as {next(iter(plan), 'conv1.weight')!r}; got {name!r}")
    if name in plan:
        return name
    if name in graph:
        op = graph.op(name)
        own = [s for s in (*op.params.values(), *op.outputs) if s in plan]
        raise InputError(f"{name!r} is an op; its sites are {', '.join(map(repr, own)) or 'none'}")
    raise InputError(f"the plan has no site {name!r}{unknown_name(name, plan, listed=False)} (print(sim.plan) has all)")


def why_none(state: SimState, site: SiteId) -> str:
    """Why a site has no encoding."""
    row = state.plan.row(site)
    if state.plan.spec(site) is None:
        return f"{row.decision}, {row.reason}"
    return "not calibrated yet"
