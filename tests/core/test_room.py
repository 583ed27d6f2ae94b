"""Grids of 16 bits are wider than what calibration saw, where codes are to spare; others end where the values did."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from bitwright.calibration import activation_requests, scheme
from bitwright.grids import PerChannel, QuantSpec
from bitwright.placement import build_plan
from bitwright.testing import models

UINT16 = QuantSpec(16, signed=False, symmetric=False)
INT16 = QuantSpec(16, signed=True, symmetric=True)


def calibrate(name, spec, *batches):
    strategy = scheme(name)
    statistic = strategy.statistic(spec)()
    for batch in batches:
        x = np.asarray(batch, np.float32)
        pair = np.array([x.min(), x.max()])
        statistic.update(pair if statistic.reduction == "minmax" else x)
    return strategy.encoding(statistic, spec)


def times(spec, x, name="sqnr"):
    """How much wider than min-max."""
    return float(calibrate(name, spec, x).scale / calibrate("minmax", spec, x).scale)


@pytest.mark.parametrize("name", ["sqnr", "scores", "mse"])
@pytest.mark.parametrize("spec", [UINT16, INT16, QuantSpec(16, signed=False, symmetric=True, unsigned_symmetric=True)])
@pytest.mark.parametrize("one_sided", [False, True])
def test_common_distributions_have_all_the_room(name, spec, one_sided):
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=100_000), rng.laplace(size=200), rng.normal(size=160)):
        assert times(spec, np.abs(x) if one_sided else x, name) == pytest.approx(2, rel=1e-4)


def test_zero_stays_where_it_is():
    x = np.random.default_rng(0).normal(1, 1, 1000)
    assert calibrate("sqnr", UINT16, x).zero_point == calibrate("minmax", UINT16, x).zero_point


def test_where_a_few_values_are_far_larger_the_grid_ends_with_them():
    x = np.random.default_rng(0).normal(size=100_000)
    x[:3] = 1000.0, -1000.0, 900.0
    assert times(UINT16, x) == 1


@pytest.mark.parametrize(("spec", "largest", "span"), [(UINT16, 20, 21), (INT16, 11, 22)])
def test_the_mean_magnitude_keeps_its_steps(spec, largest, span):
    """Half of the values are zero and count for nothing; the others are ±1 but for one."""
    x = np.tile([0.0, 0.0, 1.0, -1.0], 10_000)
    x[2] = largest
    # The mean magnitude is 1 but for a thousandth; it keeps 2048 steps of the wider grid.
    expected = 65535 / 2048 / span
    assert 1 < expected < 2
    assert times(spec, x) == pytest.approx(expected, rel=0.01)


def test_fewer_bits_what_is_pinned_and_channels_have_none():
    x = np.random.default_rng(0).normal(size=(100, 8, 4))
    for bits in (12, 14):
        assert times(UINT16.with_(bits=bits), x) == 1
    pinned = UINT16.with_(minimum=-2.0, maximum=2.0)
    assert calibrate("sqnr", pinned, x).maximum == pytest.approx(2, rel=1e-4)
    assert not scheme("sqnr").makes_room(UINT16.with_(granularity=PerChannel(1)))
    for name in ("minmax", "percentile", "entropy"):
        assert not scheme(name).makes_room(UINT16)


def test_weights_have_none():
    """Their values are all known."""
    x = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32)
    assert scheme("sqnr").of_array(x, INT16).scale == scheme("minmax").of_array(x, INT16).scale


def test_extremes_are_those_of_all_values_where_histograms_count_some():
    graph = models.conv_bn_relu().graph
    plan = build_plan(graph, "default", activations="uint16", scheme="sqnr")
    requests = activation_requests(graph, plan, list(plan.activations))
    made = [r.make() for r in requests]
    assert made and all(m.reduction == "none" for m in made)
    assert all(m.extremes == (m.step > 1) for m in made)
    narrow = build_plan(graph, "default", activations="uint8", scheme="sqnr")
    assert not any(r.make().extremes for r in activation_requests(graph, narrow, list(narrow.activations)))


def test_what_was_not_seen_is_not_clipped():
    """Ten logits of 16 images, each image's of its own size, as networks have them; and of others."""
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits = partial(lambda rng, n: rng.normal(size=(n, 10)) * rng.lognormal(0, 0.3, (n, 1)), rng)
        seen, others = logits(16), logits(16).astype(np.float32)
        lost = [np.square(calibrate(n, UINT16, seen).fake_quantize(others) - others).sum() for n in ("minmax", "sqnr")]
        gains.append(10 * np.log10(lost[0] / lost[1]))
    assert np.median(gains) > 10 and min(gains) > -8  # 6 dB at most on average, where nothing was clipped
