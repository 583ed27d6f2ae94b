"""GPTQ: equal to the textbook loop, better than nearest rounding, block scales, guarantees."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import KINDS, W4, inputs, make_layer, make_op

from bitwright.errors import EncodingError
from bitwright.graph import to_matrix
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec
from bitwright.layerwise import solution
from bitwright_techniques.block_rounding import block_rounding
from bitwright_techniques.gptq import GptqSettings, round_layer, rounded
from bitwright_techniques.reconstruction import reconstruction
from bitwright_techniques.rounding_descent import Settled, act_order, least_of, turn
from bitwright_techniques.scale_refit import sweep_with_scales
from bitwright_techniques.weight_grid import WeightGrid

BLOCKS = {"blockwise": Blockwise(0, 1, 2), "lpbq": Blockwise(0, 1, 2, 8)}


def textbook(problem, grid, order):
    """Frantar et al. 2023, algorithm 1, one weight at a time in float64; groups one after another."""
    codes = np.zeros_like(problem.weight)
    for g in range(len(problem.gram)):
        p = order[g]
        inverse = np.linalg.inv(problem.gram[g][np.ix_(p, p)])
        factor = np.linalg.cholesky(inverse).T
        weight = problem.target[g][:, p].copy()
        step, low, high = (np.broadcast_to(a[g], weight.shape)[:, p] for a in (grid.step, grid.low, grid.high))
        for i in range(len(p)):
            code = np.clip(np.rint(weight[:, i] / step[:, i]), low[:, i], high[:, i])
            error = (weight[:, i] - code * step[:, i]) / factor[i, i]
            weight[:, i:] -= np.outer(error, factor[i, i:])
            codes[g][:, p[i]] = code
    return codes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_act_order", [True, False])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_equals_the_textbook_loop(kind, in_act_order, block):
    layer = make_layer(kind, noise=0.2)
    problem = reconstruction(layer.op, layer.weight, layer.moments)
    grid = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding)
    found = rounded(problem, grid, GptqSettings(act_order=in_act_order, block_size=block)).codes
    features = problem.weight.shape[2]
    order = act_order(problem.diagonal) if in_act_order else np.tile(np.arange(features), (len(problem.gram), 1))
    assert np.array_equal(found, textbook(problem, grid, order))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_makes_up_for_rounding_and_quantized_inputs(kind, noise):
    layer = make_layer(kind, noise=noise)
    result = round_layer(layer, GptqSettings(scales="keep"))
    f = result.figures
    # Nine taps of a depthwise channel leave little to make up with.
    assert f["after"] < (1.0 if kind == "depthwise" else 0.9) * f["nearest"] <= f["before"] + 1e-9
    assert np.array_equal(result.encoding.fake_quantize(result.weight), result.weight)
    assert result.encoding.frozen
    assert result.encoding.source == "gptq"
    assert np.array_equal(result.encoding.scale, layer.encoding.scale)

    # The bias keeps the mean.
    def mean(weight, moment):
        return np.einsum("grk,gk->gr", to_matrix(layer.op, weight), moment).reshape(-1)

    shift = mean(layer.weight, layer.moments.mean) - mean(result.weight, layer.moments.mean_quantized)
    assert np.allclose(result.bias - layer.bias, shift, atol=1e-4)


def test_a_layer_whose_squares_overflow_is_left_and_numpy_says_nothing():
    layer = make_layer("linear", x=np.float32(1e25) * inputs(*make_op("linear"), np.random.default_rng(0)))
    result = solution(partial(round_layer, settings=GptqSettings(inputs="float")), layer)
    assert "overflow float32" in result.left
    assert np.array_equal(result.weight, layer.encoding.fake_quantize(layer.weight))


def test_the_target_is_w_times_c_and_not_w():
    """With inputs that differ from the float ones, ignoring that costs output error."""
    layer = make_layer("conv", noise=0.6)
    aware, blind = (round_layer(layer, GptqSettings(inputs=i)) for i in ("quantized", "float"))
    problem = reconstruction(layer.op, layer.weight, layer.moments)

    def loss(result):
        return problem.loss(to_matrix(layer.op, result.weight)).sum()

    assert loss(aware) < 0.8 * loss(blind)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_scales_chosen_on_the_way_beat_those_chosen_before(name, kind):
    better = 0
    for seed in range(4):
        layer = make_layer(kind, seed, spec=QuantSpec(4, granularity=BLOCKS[name]), noise=0.1)
        dynamic, static = (round_layer(layer, GptqSettings(groups=g)).figures["after"] for g in ("dynamic", "static"))
        better += dynamic <= static * 1.001
    assert better >= 3


def test_block_rounding_takes_the_candidate_whose_nearest_rounding_costs_least():
    """One block: the error that it spreads is the whole objective."""
    layer = make_layer("linear", spec=QuantSpec(4, granularity=Blockwise(0, 1, 12)))
    problem = reconstruction(layer.op, layer.weight, layer.moments)
    grid = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding)
    chosen, found = block_rounding(problem, grid, candidates=10)
    codes = found.codes
    full = np.maximum(problem.target.max(axis=2) / 7, -problem.target.min(axis=2) / 8).reshape(-1)
    trials = [grid.with_scale(full * i / 10) for i in range(10, 0, -1)]
    costs = np.stack([problem.objective(t.values(t.nearest(problem.target)))[0] for t in trials])
    taken = 10 - np.rint(chosen.scale / full * 10).astype(int)
    assert np.array_equal(chosen.scale, np.choose(taken, [t.scale for t in trials]))
    assert np.array_equal(taken, least_of(10, 6, lambda at, wanted: costs[at, np.arange(6)]))
    assert np.allclose(costs[taken, np.arange(6)], costs.min(axis=0), rtol=0.1)
    assert np.array_equal(codes, rounded(problem, chosen, GptqSettings()).codes)


def test_the_least_of_a_valley_is_found_in_few_trials():
    valleys = np.abs(np.arange(20)[:, None] - np.arange(20))  # of each owner at another candidate
    asked = []

    def cost(at, wanted):
        asked.append(wanted.sum())
        return np.where(wanted, valleys[at, np.arange(20)], np.nan)

    assert np.array_equal(least_of(20, 20, cost), np.arange(20))
    assert sum(asked) < 20 * 10
    assert np.array_equal(least_of(20, 3, lambda at, wanted: np.zeros(3)), [0, 0, 0])
    assert np.array_equal(least_of(1, 2, lambda at, wanted: np.ones(2)), [0, 0])


@pytest.mark.parametrize("granularity", [PerChannel(0), PerTensor(), Blockwise(0, 1, 4)])
@pytest.mark.parametrize("scale_type", [None, "float16"])
def test_scales_are_fitted_to_codes(granularity, scale_type):
    """Of the codes that T is made of, a scale is found again where the others are right; of others, none does worse."""
    layer = make_layer("linear", spec=QuantSpec(4, granularity=granularity, scale_type=scale_type))
    problem = reconstruction(layer.op, layer.weight, layer.moments)
    grid = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding)
    codes = Settled(turn(grid.nearest(problem.weight)))
    known = replace(problem, target=grid.values(codes.codes).astype(np.float64))
    wrong = grid.scale.copy()
    wrong[::3] *= 1.3
    found, kept = sweep_with_scales(known, grid.with_scale(wrong), codes)
    assert np.allclose(found.scale, grid.scale, rtol=1e-4 if scale_type is None else 1e-3)
    assert np.array_equal(kept.codes, codes.codes)
    found, moved = sweep_with_scales(problem, grid, codes)
    before = problem.objective(grid.values(codes.codes)).sum()
    after = problem.objective(found.values(moved.codes)).sum()
    assert after < 0.99 * before
    assert np.array_equal(found.scale, found.encoding.typed(found.scale))


@pytest.mark.parametrize(("kind", "block"), [("linear", 4), ("conv", 2), ("grouped", 1)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_sweep_knows_the_error_that_it_leaves(kind, block, noise):
    """Where x̂ = x, from the products that it needs anyway; blocks of convolutions don't lie together."""
    layer = make_layer(kind, spec=QuantSpec(4, granularity=Blockwise(0, 1, block)), noise=noise)
    problem = reconstruction(layer.op, layer.weight, layer.moments)
    grid = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding)
    start = Settled(turn(grid.nearest(problem.weight)))
    grid, first = sweep_with_scales(problem, grid, start)
    again, second = sweep_with_scales(problem, grid, first)
    alone = sweep_with_scales(problem, grid, Settled(first.turned))
    assert np.array_equal(alone[0].scale, again.scale) and np.array_equal(alone[1].turned, second.turned)
    for found, at in ((first, grid), (second, again)):
        assert np.allclose(found.error, turn(at.values(found.codes) - problem.goal), atol=1e-6)
        exact = problem.loss(at.values(found.codes))
        assert (found.loss is None) == bool(noise)
        assert found.loss is None or np.allclose(found.loss, exact, rtol=1e-4, atol=1e-7 * problem.energy.max())


def test_scales_that_no_better_ones_exist_for_stay():
    """Zeros scale nothing; what would turn a sign isn't a scale; LPBQ's are integers."""
    layer = make_layer("linear", spec=QuantSpec(4, granularity=Blockwise(0, 1, 4)))
    problem = reconstruction(layer.op, layer.weight, layer.moments)
    grid = WeightGrid.of(layer.op, layer.weight.shape, layer.encoding)
    codes = grid.nearest(problem.weight)
    codes[0, 0, :4] = 0
    codes[0, 1] *= -1
    found, moved = sweep_with_scales(problem, grid, Settled(turn(codes)))
    assert found.scale[0] == grid.scale[0]
    assert (found.scale > 0).all()
    assert (problem.objective(found.values(moved.codes)) <= problem.objective(grid.values(codes)) * (1 + 1e-6)).all()
    lpbq = WeightGrid.of(
        layer.op, layer.weight.shape, make_layer("linear", spec=QuantSpec(4, granularity=BLOCKS["lpbq"])).encoding
    )
    assert sweep_with_scales(problem, lpbq, Settled(turn(lpbq.nearest(problem.weight))))[0] is lpbq


@pytest.mark.parametrize("granularity", [PerChannel(0), Blockwise(0, 1, 4)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sweeps_lower_the_error(kind, granularity):
    layer = make_layer(kind, spec=QuantSpec(3, granularity=granularity), noise=0.1)
    once, swept, longer = (round_layer(layer, GptqSettings(sweeps=n)).figures["after"] for n in (0, 1, 4))
    assert longer <= swept * (1 + 1e-6)
    assert swept < once
    kept = [round_layer(layer, GptqSettings(sweeps=n, scales="keep")) for n in (0, 1)]
    assert kept[1].figures["after"] <= kept[0].figures["after"] * (1 + 1e-9)
    assert np.array_equal(kept[1].encoding.scale, layer.encoding.scale)


def test_lpbq_scales_stay_integer_multiples():
    layer = make_layer("linear", spec=QuantSpec(4, granularity=Blockwise(0, 1, 4, 8)))
    e = round_layer(layer, GptqSettings()).encoding
    assert e.block_scale.min() >= 1
    assert e.block_scale.max() <= 16
    unit = (e.scale / e.block_scale)[:, :1]
    assert np.allclose(e.scale, e.block_scale * unit, rtol=2e-7)


def test_blocks_across_groups_are_refused():
    layer = make_layer("transposed", spec=QuantSpec(4, granularity=Blockwise(1, 0, 2)))
    with pytest.raises(EncodingError, match="straddles the groups"):
        round_layer(layer, GptqSettings())


@settings(max_examples=25)
@given(
    seed=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    granularity=st.sampled_from([PerChannel(0), PerTensor()]),
    symmetric=st.booleans(),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_never_worse_than_nearest_rounding(seed, kind, bits, granularity, symmetric, noise):
    spec = QuantSpec(bits, symmetric, symmetric, granularity=granularity)
    layer = make_layer(kind, seed, spec=spec, noise=noise)
    for scales in ("keep", "search"):
        figures = round_layer(layer, GptqSettings(scales=scales, candidates=6)).figures
        assert figures["after"] <= figures["nearest"] * (1 + 1e-9)
        assert figures["after"] <= figures["before"] * (1 + 1e-9)


def test_dead_inputs_and_zero_channels():
    weight = make_layer("conv").weight.copy()
    weight[0] = 0
    x = np.random.default_rng(0).normal(size=(4, 4, 5, 5)).astype(np.float32)
    x[:, 2] = 0
    result = round_layer(make_layer("conv", weight=weight, x=x), GptqSettings())
    assert np.isfinite(result.weight).all()
    assert not result.weight[0].any()


def test_frozen_scales_are_kept():
    layer = make_layer("conv", spec=W4)
    layer.encoding = layer.encoding.with_(frozen=True, scale=layer.encoding.scale * np.float32(0.7))
    assert np.array_equal(round_layer(layer, GptqSettings()).encoding.scale, layer.encoding.scale)


@pytest.mark.parametrize("scale_type", [None, "float16", "float16+minimum"])
def test_blocks_are_rounded_at_the_scales_that_they_get(scale_type):
    """Scales of a type are of it when codes and what is left of the error are worked out, not afterwards."""
    spec = QuantSpec(4, granularity=Blockwise(0, 1, 4), scale_type=scale_type)
    if scale_type == "float16+minimum":
        spec = spec.with_(symmetric=False, signed=False)
    layer = make_layer("linear", spec=spec)
    problem = reconstruction(layer.op, layer.weight, layer.moments)
    grid, found = block_rounding(problem, WeightGrid.of(layer.op, layer.weight.shape, layer.encoding))
    assert np.array_equal(grid.scale, grid.encoding.typed(grid.scale))
    left = found.turned * turn(grid.step) - turn(problem.goal)
    assert np.array_equal(found.error, left)
