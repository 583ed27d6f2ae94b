"""The solvers against brute force and against each other."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import InputError, MissingExtraError
from bitwright_search.mixed_result import FrontPoint
from bitwright_search.mixed_search import monotone
from bitwright_search.solvers import cheapest, dearest, exact, front, greedy, greedy_path, point, solve, within

pytest.importorskip("scipy")


@st.composite
def problems(draw, groups=6, candidates=3):
    """Costs and noises over many orders of magnitude, as bit-operations and noise powers are; some are forbidden."""
    g, c = draw(st.integers(1, groups)), draw(st.integers(2, candidates))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    costs = np.exp(rng.uniform(0, 20, (g, 1))) * rng.uniform(0.2, 1, (g, c))
    noises = np.exp(rng.uniform(-18, 0, (g, c)))
    noises[rng.random((g, c)) < 0.15] = np.inf
    noises[:, 0] = np.where(np.isinf(noises[:, 0]), 1e-3, noises[:, 0])
    low, high = (point(f(costs, noises), costs, noises).cost for f in (cheapest, dearest))
    share = draw(st.floats(0, 1))
    return costs, noises, low + share * max(high - low, 0.0)


def brute_force(costs, noises, budget):
    choices = itertools.product(range(costs.shape[1]), repeat=len(costs))
    points = [point(c, costs, noises) for c in choices]
    return min(p.noise for p in points if within(p.cost, budget))


@settings(max_examples=40)
@given(problems())
def test_exact_is_the_optimum_and_never_worse_than_greedy(problem):
    costs, noises, budget = problem
    best, quick = exact(costs, noises, budget), greedy(costs, noises, budget)
    for found in (best, quick):
        assert within(found.cost, budget)
        assert np.isfinite(found.noise)
    assert best.noise <= quick.noise
    assert best.noise <= brute_force(costs, noises, budget) * (1 + 1e-6)


@settings(max_examples=10)
@given(problems(groups=30, candidates=4))
def test_exact_is_never_worse_than_greedy_on_larger_problems(problem):
    costs, noises, budget = problem
    assert solve(costs, noises, budget, "exact").noise <= solve(costs, noises, budget, "greedy").noise


@settings(max_examples=20)
@given(problems())
@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_fronts_are_monotone(solver, problem):
    costs, noises, _ = problem
    points = front(costs, noises, solver, points=7)
    assert all(a.cost < b.cost and a.noise > b.noise for a, b in itertools.pairwise(points))
    assert points[0].cost == point(cheapest(costs, noises), costs, noises).cost
    assert points[-1].noise == point(dearest(costs, noises), costs, noises).noise


@settings(max_examples=20)
@given(problems())
def test_the_exact_front_dominates_the_greedy_one(problem):
    costs, noises, _ = problem
    found = front(costs, noises, "exact", points=7)
    for p in greedy_path(costs, noises):
        assert any(q.cost <= p.cost and q.noise <= p.noise for q in found)


def test_greedy_takes_the_change_that_costs_least_noise_for_what_it_saves():
    costs = np.array([[8.0, 4.0], [8.0, 4.0], [80.0, 40.0]])
    noises = np.array([[0.0, 3.0], [0.0, 1.0], [0.0, 5.0]])
    assert [p.choice for p in greedy_path(costs, noises)] == [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)]
    # Greedy overshoots where one small change is enough; the integer program doesn't.
    assert greedy(costs, noises, 92.0).choice == (0, 0, 1)
    assert exact(costs, noises, 92.0).choice == (0, 1, 0)


@pytest.mark.parametrize("solver", [exact, greedy])
def test_a_budget_below_the_cheapest_is_refused(solver):
    with pytest.raises(InputError, match="below the cheapest assignment, 6"):
        solver(np.array([[4.0, 2.0], [8.0, 4.0]]), np.array([[0.1, 1.0], [0.1, 1.0]]), 5.0)


def test_without_scipy_the_exact_solver_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    costs, noises = np.array([[4.0, 2.0]]), np.array([[0.1, 1.0]])
    with pytest.raises(MissingExtraError, match=r"bitwright\[search\]"):
        exact(costs, noises, 3.0)
    assert greedy(costs, noises, 3.0).choice == (1,)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), max_size=12))
def test_measured_fronts_are_monotone(pairs):
    points = [FrontPoint(c, c / 20, None, s / 20, {}, {}) for c, s in pairs]
    kept = monotone(points)
    assert all(a.cost < b.cost and a.score < b.score for a, b in itertools.pairwise(kept))
    for p in points:
        assert any(k.cost <= p.cost and k.score >= p.score for k in kept)
