"""AdaRound on single layers: error, grid, choices, bias, degenerate inputs; and on whole models by the contract."""

from typing import ClassVar

import numpy as np
import pytest
from layers import KINDS, W4, make_layer
from pydantic import ValidationError

from bitwright.errors import InputError
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec
from bitwright.testing import models
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.reference import ReferenceBackend
from bitwright.testing.technique_contract import TechniqueContract, output_error
from bitwright_techniques.adaround import AdaRound, AdaRoundSettings, round_layer

SPECS = {
    "per_channel": W4,
    "per_tensor": QuantSpec(4, granularity=PerTensor()),
    "asymmetric": QuantSpec(4, signed=False, symmetric=False, granularity=PerChannel(0)),
    "strict_int3": QuantSpec(3, strict=True, granularity=PerChannel(0)),
}
QUICK = {"kicks": 2, "iterations": 800}


def solve(layer, **settings):
    return round_layer(layer, AdaRoundSettings(**{**QUICK, **settings}), np.random.default_rng(0))


def nearest_error(layer):
    return output_error(layer, layer.encoding.fake_quantize(layer.weight), layer.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["coordinate_descent", "gradient"])
@pytest.mark.parametrize("scales", ["search", "keep"])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_lowers_the_output_error_and_stays_on_the_grid(kind, solver, scales, noise):
    layer = make_layer(kind, noise=noise)
    result = solve(layer, solver=solver, scales=scales)
    assert output_error(layer, result.weight, result.bias) < nearest_error(layer)
    assert np.array_equal(result.encoding.fake_quantize(result.weight), result.weight)
    assert result.encoding.frozen
    assert result.encoding.source == "adaround"
    assert result.figures["settled"] >= 0.99
    assert result.figures["after"] <= result.figures["nearest"] + 1e-12
    if scales == "keep":
        assert result.encoding.equals(layer.encoding)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("solver", ["coordinate_descent", "gradient"])
def test_moves_no_weight_by_a_whole_step(name, solver):
    layer = make_layer("conv", noise=0.3, spec=SPECS[name])
    result = solve(layer, solver=solver)
    step, _ = result.encoding.spread(layer.weight.shape)
    low, high = (np.asarray(a) for a in (result.encoding.minimum, result.encoding.maximum))
    shape = (-1, 1, 1, 1) if low.ndim else ()
    clipped = np.clip(layer.weight, low.reshape(shape), high.reshape(shape))
    assert (np.abs(result.weight - clipped) < step * (1 + 1e-5)).all()


def test_a_weight_on_its_grid_stays():
    layer = make_layer("conv")
    layer.weight = layer.encoding.fake_quantize(layer.weight)
    result = solve(layer, scales="keep")
    assert np.array_equal(result.weight, layer.weight)


def test_any_grid_point_may_be_taken_when_asked():
    layer = make_layer("linear", noise=1.0)
    near, free = (solve(layer, scales="keep", choices=c) for c in ("neighbours", "any"))
    assert free.figures["after"] < near.figures["after"]


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("decompressed", [None, 8])
def test_blockwise_scales(kind, decompressed):
    layout = Blockwise(0, 1, 2 if kind == "conv" else 4, decompressed)
    layer = make_layer(kind, spec=QuantSpec(4, granularity=layout))
    result = solve(layer)
    assert output_error(layer, result.weight, result.bias) < nearest_error(layer)
    assert np.array_equal(result.encoding.fake_quantize(result.weight), result.weight)
    if decompressed:
        factors = result.encoding.block_scale
        assert factors.min() >= 1
        assert factors.max() <= 16
        unit = result.encoding.scale / factors
        assert np.allclose(unit, unit[:, :1], rtol=1e-6)


def test_bias_keeps_the_mean_output():
    layer = make_layer("conv", noise=0.3)
    result = solve(layer)
    w, v = layer.weight.reshape(5, -1), result.weight.reshape(5, -1)
    before = w @ layer.moments.mean[0] + layer.bias
    after = v @ layer.moments.mean_quantized[0] + result.bias
    assert np.allclose(before, after, atol=1e-5)
    assert solve(layer, bias_correction=False).bias is None
    assert solve(make_layer("conv", bias=False), bias_correction=True).bias.shape == (5,)


@pytest.mark.parametrize("solver", ["coordinate_descent", "gradient"])
def test_degenerate_layers_give_finite_weights_on_the_grid(solver):
    weight = make_layer("depthwise").weight.copy()
    weight[0] = 0
    weight[1] *= 1e-8
    x = np.random.default_rng(1).normal(size=(6, 8, 5, 5)).astype(np.float32)
    x[:, 2] = 0  # dead input
    x[:, 3] = 3.7  # constant input
    x[:, 4] *= 1e-18
    x[:, 5] *= 1e12
    layer = make_layer("depthwise", weight=weight, x=x)
    result = solve(layer, solver=solver)
    assert np.isfinite(result.weight).all()
    assert np.isfinite(result.bias).all()
    assert np.array_equal(result.encoding.fake_quantize(result.weight), result.weight)
    assert not result.weight[0].any()
    step = result.encoding.scale[2]
    assert (np.abs(result.weight[2] - weight[2]) < step * 1.01).all()


def test_fewer_samples_than_features():
    x = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    layer = make_layer("linear", x=x)
    result = solve(layer)
    assert output_error(layer, result.weight, result.bias) <= nearest_error(layer)


def test_frozen_scales_are_kept():
    layer = make_layer("conv")
    layer.encoding = layer.encoding.with_(scale=layer.encoding.scale * np.float32(0.7), frozen=True)
    assert solve(layer).encoding.equals(layer.encoding)


def test_equal_seeds_give_equal_bits():
    layer = make_layer("grouped", noise=0.2)
    a, b = solve(layer), solve(layer)
    assert np.array_equal(a.weight, b.weight)
    assert a.encoding.equals(b.encoding)


def test_layers_are_chosen_by_pattern_and_the_rest_reported():
    model = models.mlp()
    names = [op.id for op in model.graph.linear_ops]
    done = run_technique(AdaRound(), ReferenceBackend(), model, [models.batch(model)], exclude=(names[0],), **QUICK)
    assert done.walk.visited == names[1:]
    assert (names[0], "excluded") in [row[:2] for row in done.outcome.report.rows]
    with pytest.raises(InputError, match="no_such_layer"):
        run_technique(AdaRound(), ReferenceBackend(), model, [models.batch(model)], include=("no_such_layer",))


@pytest.mark.parametrize("wrong", [{"solver": "magic"}, {"damping": -1}, {"iterations": 0}, {"candidates": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        AdaRoundSettings(**wrong)


def test_model_output_is_nearer_to_float_than_with_nearest_rounding():
    model = models.conv_bn_relu(depth=3)
    data = [models.batch(model, 16, s) for s in range(4)]
    backend = ReferenceBackend()
    plan = simple_plan(model.graph, weights=W4, activations=None)
    done = run_technique(AdaRound(), backend, model, data, plan=plan)
    test = models.batch(model, 16, 99)
    want = model(test)

    def error(changed, encodings):
        sim = backend.simulate(changed, plan, encodings)
        got = sim.model(test)
        return sum(float(np.mean((got[t] - want[t]) ** 2)) for t in want)

    assert error(done.model, done.encodings) < 0.8 * error(model, done.context.encodings)


class TestAdaRoundDescent(TechniqueContract):
    reconstructs = True
    settings: ClassVar = {"kicks": 1}

    def technique(self):
        return AdaRound()


class TestAdaRoundGradient(TechniqueContract):
    reconstructs = True
    settings: ClassVar = {"solver": "gradient", "iterations": 150, "inputs": "float", "scales": "keep"}

    def technique(self):
        return AdaRound()
