"""The numeric solvers behind AdaRound, against brute force, finite differences and direct evaluation."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import KINDS, inputs, make_layer

from bitwright.graph import columns, to_matrix
from bitwright.statistics import LayerMoments
from bitwright.technique import Layer
from bitwright_techniques.adaround import AdaRoundSettings, round_layer
from bitwright_techniques.joint_search import Effort, LayerSearch
from bitwright_techniques.reconstruction import corrected_bias, reconstruction
from bitwright_techniques.rounding_descent import (
    RoundingProblem,
    coordinate_descent,
    factor,
    kick,
    successive_rounding,
    turn,
)
from bitwright_techniques.rounding_relaxation import Relaxation, RelaxedRounding, initial, rectified_sigmoid, relax
from bitwright_techniques.weight_grid import WeightGrid


def random_problem(seed, groups=1, rows=3, features=5, bounds=1):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(groups, features, features))
    gram = (root @ np.swapaxes(root, 1, 2) + 0.05 * np.eye(features)).astype(np.float32)
    target = rng.normal(size=(groups, rows, features)).astype(np.float32) * 2
    step = rng.uniform(0.5, 1, (groups, rows, 1)).astype(np.float32)
    low = np.floor(target / step) - (bounds - 1)
    return RoundingProblem.of(gram, target, step, low, low + 2 * bounds - 1), low


def brute_force(problem):
    """Least loss of each row over all codes."""
    features = problem.target.shape[1]
    choices = np.array(list(product((0, 1), repeat=features)), np.float32)
    losses = [problem.loss(problem.low + c[None, :, None]) for c in choices]
    return np.min(losses, axis=0)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_in_moments_is_the_mean_squared_output_error(kind):
    rng = np.random.default_rng(3)
    layer = make_layer(kind, noise=0.3)
    op = layer.op
    x = inputs(op, layer.weight.shape, rng, samples=4)
    q = x + rng.normal(size=x.shape).astype(np.float32) * 0.2
    moments = type(layer.moments)(op, layer.moments.qq.shape[1])
    moments.update(x, q)
    problem = reconstruction(op, layer.weight, moments, free_bias=False, damping=0.0)
    w, v = to_matrix(op, layer.weight), to_matrix(op, layer.encoding.fake_quantize(layer.weight))
    (cx,), (cq,) = list(columns(op, x)), list(columns(op, q))
    direct = np.mean((w.astype(float) @ cx - v.astype(float) @ cq) ** 2, axis=2)
    assert np.allclose(problem.loss(v), direct, rtol=1e-4)
    # The damped objective differs from the damped error by a constant only.
    damped = reconstruction(op, layer.weight, moments, free_bias=False, damping=0.1)
    other = v + 0.1 * rng.normal(size=v.shape)
    penalty = [damped.damping[:, None] * ((a - w.astype(float)) ** 2).sum(axis=2) for a in (v, other)]
    change = damped.loss(other) + penalty[1] - damped.loss(v) - penalty[0]
    assert np.allclose(damped.objective(other) - damped.objective(v), change, rtol=1e-6, atol=1e-9)


def test_free_bias_loss_is_what_the_corrected_bias_leaves():
    layer = make_layer("linear", noise=0.4)
    rng = np.random.default_rng(5)
    x = rng.uniform(0, 1, (300, 12)).astype(np.float32)
    q = x + 0.3 * rng.uniform(0, 1, x.shape).astype(np.float32)
    moments = type(layer.moments)(layer.op, 12)
    moments.update(x, q)
    v = layer.encoding.fake_quantize(layer.weight)
    bias = corrected_bias(layer.op, layer.weight, v, layer.bias, moments)
    direct = np.mean((x @ layer.weight.T + layer.bias - q @ v.T - bias) ** 2, axis=0)
    problem = reconstruction(layer.op, layer.weight, moments, damping=0.0)
    assert np.allclose(problem.loss(v[None])[0], direct, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
@given(seed=st.integers(0, 10_000), features=st.integers(1, 150))
@settings(max_examples=15, deadline=None)
def test_descent_never_rises_and_ends_where_no_single_move_helps(groups, seed, features):
    problem, low = random_problem(seed, groups, 2, features)
    codes = turn(low)
    loss = problem.loss(codes)
    for _ in range(50):
        after = coordinate_descent(problem, codes, max_sweeps=1)
        new = problem.loss(after)
        assert (new <= loss * (1 + 1e-5) + 1e-6).all()
        if np.array_equal(after, codes):
            break
        codes, loss = after, new
    else:
        pytest.fail("descent doesn't end")
    for k in range(0, features, max(features // 7, 1)):
        moved = codes.copy()
        moved[:, k] = problem.low[:, k] + problem.high[:, k] - moved[:, k]
        assert (problem.loss(moved) >= loss * (1 - 1e-4) - 1e-5).all()


def test_blocks_don_t_change_the_descent(monkeypatch):
    from bitwright_techniques import rounding_descent

    problem, low = random_problem(0, 2, 4, 90)
    ends, starts = [], []
    for block in (7, 64, 1000):
        monkeypatch.setattr(rounding_descent, "_BLOCK", block)
        ends.append(coordinate_descent(problem, turn(low), max_sweeps=1))
        starts.append(successive_rounding(problem, *factor(problem.gram)))
    assert all(np.array_equal(e, ends[0]) for e in ends)
    assert all(np.array_equal(s, starts[0]) for s in starts)


def test_successive_rounding_is_the_textbook_recursion():
    problem, _ = random_problem(4, 2, 3, 6, bounds=50)
    order, _ = factor(problem.gram)
    got = successive_rounding(problem, *factor(problem.gram))
    for g in range(2):
        gram, t = problem.gram[g].astype(float), problem.target[g].astype(float)
        fixed, values = [], np.zeros_like(t)
        for k in order[g]:
            free = [i for i in range(6) if i not in fixed]
            # Optimum of the free features, given those fixed: the one that rounding is then applied to.
            best = t.copy()
            if fixed:
                error = values[fixed] - t[fixed]
                best[free] = t[free] - np.linalg.solve(gram[np.ix_(free, free)], gram[np.ix_(free, fixed)] @ error)
            code = np.rint(best[k] / problem.step[g, 0])
            assert np.array_equal(got[g, k], code)
            values[k] = code * problem.step[g, 0]
            fixed.append(k)


@pytest.mark.parametrize("seed", range(4))
def test_search_finds_the_optimum_of_tiny_layers(seed):
    problem, low = random_problem(seed, 2, 4, 8)
    best = brute_force(problem)
    start = coordinate_descent(problem, turn(low))
    found = kick(problem, start, np.random.default_rng(0), kicks=200, share=0.25)
    assert (problem.loss(found) <= problem.loss(start)).all()
    assert np.allclose(problem.loss(found), best, rtol=1e-4, atol=1e-5)


def test_gradient_is_the_derivative_of_the_loss():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(2, 7, 7))
    gram = root @ np.swapaxes(root, 1, 2)
    target, step = rng.normal(size=(2, 3, 7)), rng.uniform(0.5, 1, (2, 3, 1))
    low = np.floor(target / step)
    high = low + (rng.random(low.shape) < 0.8)
    problem = RelaxedRounding(gram, target, step, low, high, 0.7)
    v = rng.uniform(-2, 2, target.shape)
    v[np.abs(2 * rectified_sigmoid(v) - 1) < 0.1] = 0.5
    for beta in (None, 2.0, 7.0):
        got = problem.gradient(v, beta)
        for index in np.ndindex(v.shape):
            ahead, behind = v.copy(), v.copy()
            ahead[index] += 1e-6
            behind[index] -= 1e-6
            slope = (problem.loss(ahead, beta) - problem.loss(behind, beta)).sum() / 2e-6
            assert np.isclose(got[index], slope, rtol=1e-5, atol=1e-7)


def test_relaxation_starts_at_the_weight():
    fraction = np.linspace(0, 1, 11).astype(np.float32)
    assert np.allclose(rectified_sigmoid(initial(fraction)), fraction, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_relaxation_settles_whatever_the_magnitude_of_the_layer(scale):
    layer = make_layer("conv")
    problem = reconstruction(layer.op, layer.weight, layer.moments)
    grid = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding)
    low, high = grid.neighbours(problem.weight)
    relaxed = RelaxedRounding(problem.unit_gram * np.float32(scale), problem.goal, grid.step, low, high, 1.0)
    codes, settled = relax(relaxed, problem.weight.astype(np.float32), Relaxation(800))
    assert settled >= 0.99
    near = problem.objective(grid.values(grid.nearest(problem.weight)))
    assert problem.objective(grid.values(codes)).sum() < near.sum()


def test_schedule_is_the_paper_s():
    schedule = Relaxation(1000)
    assert schedule.beta_at(199) is None
    assert schedule.beta_at(200) == pytest.approx(20)
    assert schedule.beta_at(600) == pytest.approx(11)
    assert schedule.beta_at(999) == pytest.approx(2, abs=1e-3)


def test_joint_search_is_no_worse_than_fixed_scales():
    layer = make_layer("conv")
    problem = reconstruction(layer.op, layer.weight, layer.moments)
    grid = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding)
    search = LayerSearch(problem, "neighbours", Effort(kicks=0))
    fixed = search.roundings(grid, np.random.default_rng(0))
    joint_grid, joint = search.roundings_and_scales(grid, np.random.default_rng(0))
    assert problem.objective(joint_grid.values(joint)).sum() <= problem.objective(grid.values(fixed)).sum() * (1 + 1e-6)


def skip_layer():
    """A layer whose output is added to a tensor with an error r that the layer's input partly explains."""
    rng = np.random.default_rng(7)
    layer = make_layer("linear")
    x = rng.uniform(0, 1, (400, 12)).astype(np.float32)
    q = x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    r = (0.2 * q @ rng.normal(size=(12, 6)) + 0.05 * rng.normal(size=(400, 6)) + 0.3).astype(np.float32)
    layer.moments = LayerMoments(layer.op, 12, residual_outputs=6)
    layer.moments.update(x, q, r)
    return layer, x, q, r


def test_a_skip_connection_s_error_is_part_of_the_target():
    layer, x, q, r = skip_layer()
    w, v = layer.weight.astype(float), layer.encoding.fake_quantize(layer.weight).astype(float)
    problem = reconstruction(layer.op, layer.weight, layer.moments, free_bias=False, damping=0.0)
    direct = [np.mean((x @ w.T + r - q @ a.T) ** 2, axis=0) for a in (v, w)]
    change = problem.loss(v[None]) - problem.loss(w[None])
    assert np.allclose(change[0], direct[0] - direct[1], rtol=1e-4, atol=1e-5)
    bias = corrected_bias(layer.op, layer.weight, v, layer.bias, layer.moments)
    assert np.allclose(np.mean(x @ w.T + layer.bias + r, axis=0), np.mean(q @ v.T + bias, axis=0), atol=1e-4)


def test_making_up_for_a_skip_connection_lowers_the_error_of_the_sum():
    layer, x, q, r = skip_layer()
    alone = LayerMoments(layer.op, 12)
    alone.update(x, q)
    errors = []
    for moments in (layer.moments, alone):
        given = Layer(layer.op, layer.weight, layer.bias, moments, layer.encoding)
        result = round_layer(given, AdaRoundSettings(), np.random.default_rng(0))
        sums = x @ layer.weight.T + layer.bias + r, q @ result.weight.T + result.bias
        errors.append(np.mean((sums[0] - sums[1]) ** 2))
    assert errors[0] < 0.7 * errors[1]
