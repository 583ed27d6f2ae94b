"""Choosing one candidate for each group: the least noise whose cost stays within a budget.

A multiple-choice knapsack. Noise adds up over groups (their errors are taken as independent), cost does too::

    minimize Σ_g noise[g, c(g)]   subject to   Σ_g cost[g, c(g)] ≤ budget

`exact` solves it as an integer program (HiGHS, through `scipy.optimize.milp`); `greedy` takes, step by step, the
change that saves most cost for the noise it adds. Forbidden choices have infinite noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.errors import InputError, MissingExtraError

Table = NDArray[np.float64]
Choice = tuple[int, ...]
Solver = Literal["exact", "greedy"]

POINTS = 24
"""Budgets between the cheapest and the dearest assignment at which a front is solved exactly."""


@dataclass(frozen=True)
class Point:
    """An assignment on a front: a candidate's index for each group, with its total cost and noise."""

    choice: Choice
    cost: float
    noise: float


def point(choice: Sequence[int], costs: Table, noises: Table) -> Point:
    """Totals of an assignment."""
    rows = np.arange(len(costs))
    return Point(tuple(map(int, choice)), float(costs[rows, choice].sum()), float(noises[rows, choice].sum()))


def dearest(costs: Table, noises: Table) -> Choice:
    """Each group's candidate of least noise; of equals the cheapest."""
    return tuple(min(_allowed(n), key=lambda c: (n[c], k[c])) for k, n in zip(costs, noises, strict=True))


def cheapest(costs: Table, noises: Table) -> Choice:
    """Each group's candidate of least cost; of equals the one of least noise."""
    return tuple(min(_allowed(n), key=lambda c: (k[c], n[c])) for k, n in zip(costs, noises, strict=True))


def _allowed(noises: Table) -> list[int]:
    return [c for c in range(len(noises)) if np.isfinite(noises[c])]


def greedy_path(costs: Table, noises: Table) -> list[Point]:
    """From the assignment of least noise to the cheapest, a change at a time: least added noise for the cost saved.

    Changes that lower cost and noise at once (measured noise isn't always monotone) come first.
    """
    current = list(dearest(costs, noises))
    path = [point(current, costs, noises)]
    while True:
        best: tuple[float, int, int] | None = None
        for g in range(len(costs)):
            for c in _allowed(noises[g]):
                saved = costs[g, current[g]] - costs[g, c]
                if saved <= 0:
                    continue
                ratio = float((noises[g, c] - noises[g, current[g]]) / saved)
                if best is None or (ratio, g, c) < best:
                    best = (ratio, g, c)
        if best is None:
            return path
        current[best[1]] = best[2]
        path.append(point(current, costs, noises))


def greedy(costs: Table, noises: Table, budget: float) -> Point:
    """The first assignment of the greedy path within the budget.

    Raises:
        InputError: even the cheapest assignment costs more.
    """
    for found in greedy_path(costs, noises):
        if within(found.cost, budget):
            return found
    raise _too_small(costs, noises, budget)


def exact(costs: Table, noises: Table, budget: float, *, seconds: float = 60.0) -> Point:
    """The assignment of least noise within the budget; never worse than `greedy`.

    Args:
        costs, noises: (groups, candidates).
        budget: in the unit of `costs`.
        seconds: time limit; the best assignment found by then is returned.

    Raises:
        InputError: even the cheapest assignment costs more.
        MissingExtraError: scipy isn't installed.
    """
    start = greedy(costs, noises, budget)
    groups, candidates = costs.shape
    allowed = np.isfinite(noises)
    # Both in units of their own, since HiGHS's tolerances are absolute: cost in budgets, noise in greedy solutions.
    unit = max(budget, np.finfo(np.float64).tiny)
    weight = start.noise if start.noise > 0 else 1.0
    objective = np.asarray(np.where(allowed, noises / weight, 0.0).ravel() * 1e3, np.float64)
    choose = np.asarray(np.kron(np.eye(groups), np.ones(candidates)), np.float64)
    margin = 0.0
    for _ in range(3):
        solution = _milp(objective, choose, (costs / unit).ravel(), 1.0 - margin, allowed.ravel(), seconds)
        if solution is None:
            return start
        found = point(solution.reshape(groups, candidates).argmax(axis=1), costs, noises)
        if within(found.cost, budget):
            return found if found.noise <= start.noise else start
        # The solver's feasibility tolerance let it overshoot: a slightly smaller budget brings it back.
        margin = 2 * max(margin, found.cost / unit - 1.0)
    return start


def _milp(
    objective: Table, choose: Table, costs: Table, budget: float, allowed: NDArray[np.bool_], seconds: float
) -> Table | None:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise MissingExtraError('the exact solver needs scipy: pip install "bitwright[search]"') from error
    result = milp(
        objective,
        constraints=[LinearConstraint(choose, 1.0, 1.0), LinearConstraint(costs[None], -np.inf, budget)],
        integrality=np.ones_like(objective),
        bounds=Bounds(0.0, allowed.astype(np.float64)),
        options={"mip_rel_gap": 0.0, "time_limit": seconds},
    )
    return None if result.x is None else np.asarray(result.x, np.float64)


def solve(costs: Table, noises: Table, budget: float, solver: Solver) -> Point:
    """`exact` or `greedy`."""
    return exact(costs, noises, budget) if solver == "exact" else greedy(costs, noises, budget)


def front(costs: Table, noises: Table, solver: Solver, points: int = POINTS) -> list[Point]:
    """Assignments from the cheapest to the dearest, none of which costs more and is noisier than another.

    Args:
        costs, noises: (groups, candidates).
        solver: "greedy" walks one path; "exact" solves at `points` budgets, evenly spaced, and keeps what of the
            greedy path is not dominated.
        points: see `solver`.
    """
    path = greedy_path(costs, noises)
    low, high = point(cheapest(costs, noises), costs, noises), point(dearest(costs, noises), costs, noises)
    found = [low, high, *path]
    if solver == "exact" and high.cost > low.cost:
        found += [exact(costs, noises, float(b)) for b in np.linspace(low.cost, high.cost, points)[1:-1]]
    return undominated(found)


def undominated(points: Sequence[Point]) -> list[Point]:
    """Points by rising cost with strictly falling noise."""
    kept: list[Point] = []
    for candidate in sorted(points, key=lambda p: (p.cost, p.noise, p.choice)):
        if not kept or candidate.noise < kept[-1].noise:
            kept.append(candidate)
    return kept


def within(cost: float, budget: float) -> bool:
    """Whether a cost is within a budget, up to the rounding of a sum."""
    return cost <= budget * (1 + 1e-9)


def _too_small(costs: Table, noises: Table, budget: float) -> InputError:
    least = point(cheapest(costs, noises), costs, noises).cost
    return InputError(
        f"a budget of {budget:.4g} is below the cheapest assignment, {least:.4g}; add cheaper candidates, or allow more"
    )
