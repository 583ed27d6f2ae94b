"""Layers whose inputs barely vary around a large mean, never change, or are dead: solved, and no worse than nearest."""

from __future__ import annotations

import numpy as np
import pytest
from backends import FRAMEWORKS

from bitwright.graph import Op, OpKind
from bitwright.statistics import LayerMoments
from bitwright.testing.builder import Builder
from bitwright_techniques.reconstruction import reconstruction
from bitwright_techniques.rounding_descent import factor

FEATURES = 160


def network():
    b = Builder(0)
    x = b.relu("act", b.conv("conv1", b.input("x", FEATURES, 2, 2), 6, 1))
    return b.build(b.conv("conv2", x, 3, 1))


def inputs(samples=48):
    rng = np.random.default_rng(1)
    mean = 300 * np.linspace(0.5, 1, FEATURES)[:, None, None]
    x = (rng.standard_normal((samples, FEATURES, 2, 2)) + mean).astype(np.float32)
    x[:, 3], x[:, 4] = 0, 17
    return {"x": x}


def decibels(sim, data):
    expected, found = (sim.predict(data, simulated=s)[0].astype(np.float64) for s in (False, True))
    return 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())


@pytest.mark.parametrize("port", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_every_solver_is_no_worse_than_nearest(port):
    model, data = network(), port.batch(inputs())
    nearest = decibels(port.sim(model, weights="int4").calibrate(data), data)
    for technique in ("adaround", "gptq"):
        sim = port.sim(model, weights="int4").calibrate(data)
        float_outputs = sim.predict(data, simulated=False)[0]
        sim.apply(technique, data).calibrate(data)
        found = sim.predict(data)[0].astype(np.float64)
        after = 10 * np.log10(np.square(float_outputs).sum() / np.square(found - float_outputs).sum())
        assert after > nearest + 3, technique


@pytest.mark.parametrize("samples", [1, 2, 40])
@pytest.mark.parametrize("kind", ["steady", "constant", "dead", "one feature"])
@pytest.mark.parametrize("free_bias", [True, False])
def test_the_damped_problem_has_a_factor_without_damping(samples, kind, free_bias):
    rng, features = np.random.default_rng(2), 1 if kind == "one feature" else 300
    x = (1e4 + rng.standard_normal((samples, features))).astype(np.float32)
    if kind in ("constant", "dead"):
        x[:] = 5e3 if kind == "constant" else 0
    moments = LayerMoments(Op("fc", OpKind.LINEAR, "Gemm", ("x",), ("y",)), features)
    moments.update(x, np.round(x / 3) * 3)
    weight = rng.standard_normal((4, features)).astype(np.float32)
    problem = reconstruction(moments.op, weight, moments, free_bias=free_bias, damping=0.0)
    order, upper = factor(problem.unit_gram)
    product = upper[0].astype(np.float64) @ upper[0].T
    expected = problem.unit_gram[0][np.ix_(order[0], order[0])]
    assert np.isfinite(upper).all() and np.isfinite(problem.target).all()
    assert np.abs(product - expected).max() < 1e-4 * np.abs(expected).max()
    if kind != "steady":
        return
    assert np.abs(problem.target).max() < 1e3


def test_an_overflow_is_told():
    moments = LayerMoments(Op("fc", OpKind.LINEAR, "Gemm", ("x",), ("y",)), 3)
    x = np.full((4, 3), 1e30, np.float32) * np.array([[1], [-1], [2], [-2]], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        moments.update(x, x)
        with pytest.raises(FloatingPointError, match="overflow"):
            reconstruction(moments.op, np.ones((2, 3), np.float32), moments)


def test_layers_beyond_the_budget_are_named_and_keep_their_float_weight():
    port = next(iter(FRAMEWORKS.values()))
    data = port.batch(inputs(8))
    sim = port.sim(network(), weights="int4").calibrate(data)
    wide, narrow = sim.graph.linear_ops
    before = sim.params[wide.weight].copy()
    with pytest.warns(
        UserWarning, match=rf"adaround: 1 of 2 layers stay rounded to nearest: '{wide.id}': .*moments_gib"
    ):
        sim.apply("adaround", data, moments_gib=1e-5)
    _, report = sim.reports[-1]
    assert report.figures["layers"] == 1 and wide.id in report.summary
    assert any(row[0] == wide.id and "moments_gib" in row[1] for row in report.rows)
    assert np.array_equal(sim.params[wide.weight], before)
    assert wide.weight not in sim.encodings and sim.encodings[narrow.weight].frozen
    sim.calibrate(data)
    with pytest.warns(UserWarning, match="moments_gib"):
        sim.apply("seq_mse", data, moments_gib=1e-6)
