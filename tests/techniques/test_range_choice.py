"""Weight clipping and the choice of activation ranges."""

import numpy as np
import pytest
from backends import FRAMEWORKS
from layers import KINDS, W4, make_layer, make_op
from pydantic import ValidationError

from bitwright.errors import InputError
from bitwright.graph import to_matrix
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec, encoding_from_range, encoding_of_weights
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.reference import ReferenceBackend
from bitwright_techniques.activation_ranges import ActivationRanges, ActivationRangesSettings
from bitwright_techniques.reconstruction import reconstruction
from bitwright_techniques.weight_clipping import WeightClipping, clip_layer, weight_problem

UINT4 = QuantSpec(4, signed=False, symmetric=False, granularity=PerChannel(0))


def clipped(layer, *, by_output, candidates=20):
    problem = (
        reconstruction(layer.op, layer.weight, layer.moments, free_bias=False, damping=0.0, inputs="float")
        if by_output
        else weight_problem(layer.op, layer.weight)
    )
    return clip_layer(layer.op, layer.weight, layer.encoding, problem, candidates), problem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_output", [True, False])
def test_lowers_the_error_it_is_judged_by(kind, by_output):
    layer = make_layer(kind)
    result, problem = clipped(layer, by_output=by_output)
    before, after = (
        problem.loss(to_matrix(layer.op, e.fake_quantize(layer.weight))).sum()
        for e in (layer.encoding, result.encoding)
    )
    assert after < before
    assert result.encoding.frozen
    assert result.bias is None
    assert np.isclose(result.figures["after"], after / problem.energy.sum(), rtol=1e-4)


def test_weight_error_is_the_least_of_all_candidates():
    layer = make_layer("conv")
    result, _ = clipped(layer, by_output=False)
    rows = layer.weight.reshape(len(layer.weight), -1)
    errors = []
    for i in range(1, 21):
        e = layer.encoding.with_(scale=layer.encoding.scale * np.float32(i / 20))
        errors.append(np.square(e.fake_quantize(layer.weight).reshape(rows.shape) - rows).sum(axis=1))
    reached = np.square(result.encoding.fake_quantize(layer.weight).reshape(rows.shape) - rows).sum(axis=1)
    assert (reached <= np.min(errors, axis=0) * (1 + 1e-5)).all()


@pytest.mark.parametrize("granularity", [PerChannel(0), PerTensor()])
def test_asymmetric_ranges_are_clipped_at_each_end(granularity):
    """An outlier at the low end only: the high end stays where it is."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(-0.2, 1.0, (6, 256)).astype(np.float32)
    weight[:, 3] = -1.6
    op, given = make_op("linear")[0], encoding_of_weights(weight, UINT4.with_(granularity=granularity))
    e = clip_layer(op, weight, given, weight_problem(op, weight), 20).encoding
    assert (np.asarray(e.minimum) > -1.55).all()
    assert (np.asarray(e.maximum) > 0.85).all()
    # Both ends together can't do better.
    spec = UINT4.with_(granularity=granularity)
    low = weight.min(axis=1) if isinstance(granularity, PerChannel) else weight.min()
    high = weight.max(axis=1) if isinstance(granularity, PerChannel) else weight.max()

    def error(x):
        return np.square(x.fake_quantize(weight) - weight).sum()

    joint = min(error(encoding_from_range(spec, low * f, high * f)) for f in np.arange(1, 21) / 20)
    assert error(e) <= joint


@pytest.mark.parametrize("layout", [Blockwise(0, 1, 4), Blockwise(0, 1, 4, 8)])
def test_blocks_are_clipped_one_by_one(layout):
    layer = make_layer("linear", spec=QuantSpec(4, granularity=layout))
    result, _ = clipped(layer, by_output=False)
    error = [np.square(e.fake_quantize(layer.weight) - layer.weight).sum() for e in (layer.encoding, result.encoding)]
    assert error[1] < error[0]


def test_metric_output_needs_data_and_auto_follows_them():
    model = models.mlp()
    plan = simple_plan(model.graph, weights=W4)
    with pytest.raises(InputError, match="calibration data"):
        run_technique(WeightClipping(), ReferenceBackend(), model, plan=plan, metric="output")
    data = [models.batch(model)]
    reports = [
        run_technique(WeightClipping(), ReferenceBackend(), model, d, plan=plan).outcome.report for d in ([], data)
    ]
    assert "weight error" in reports[0].summary
    assert "output error" in reports[1].summary


# -- activations


def spiky(seed=0):
    """A linear layer that hardly reads the channel with outliers, and one behind it that does."""
    b = Builder(seed)
    x = b.input("x", 8)
    weight = b.rng.normal(size=(8, 8))
    weight[:, 0] = 1e-4
    x = b.linear("blind", x, 8, weight=weight)
    return b.build(b.softmax("softmax", x))


def data(model, outlier=200.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 8)).astype(np.float32)
    x[100, 0] = outlier
    return [{"x": part} for part in np.split(x, 4)]


def choose(model, batches, **settings):
    plan = simple_plan(model.graph)
    return run_technique(ActivationRanges(), ReferenceBackend(), model, batches, plan=plan, **settings)


def test_outliers_that_nothing_reads_are_clipped():
    model = spiky()
    done = choose(model, data(model))
    rows = {row[0]: row for row in done.outcome.report.rows}
    assert rows["x"][1] != "minmax"
    assert rows["x"][2] == "blind"
    assert float(done.outcome.encodings["x"].maximum) < 100
    # Its error is the least of all candidates, and the quantized output is nearer than with min-max.
    errors = rows["x"][3:]
    assert errors[ActivationRangesSettings().schemes.index(rows["x"][1])] == min(errors)
    batch = data(model)[0]
    (expected,) = model(batch).values()
    found = []
    for encodings in (done.context.encodings, done.encodings):
        simulation = ReferenceBackend().simulate(model, done.context.plan, encodings)
        (value,) = simulation.model(batch).values()
        found.append(np.square(value - expected).sum())
    assert found[1] < found[0]


def test_outliers_that_matter_are_kept():
    b = Builder()
    weight = b.rng.normal(size=(8, 8))
    weight[:, 0] *= 50
    model = b.build(b.linear("reader", b.input("x", 8), 8, weight=weight))
    done = choose(model, data(model, 20.0))
    assert float(done.outcome.encodings["x"].maximum) > 15


def test_sites_without_a_linear_reader_are_judged_by_their_own_error():
    model = spiky()
    rows = {row[0]: row for row in choose(model, data(model)).outcome.report.rows}
    assert rows["softmax.output"][2] == "its own values"
    assert all(0 <= e < 1 for e in rows["softmax.output"][3:])


def test_sites_without_a_linear_reader_are_left_to_calibration_where_tokens_are_normalized(monkeypatch):
    """Their squared error is that of a few massive tokens, which the norms shrink again."""
    model = spiky()
    monkeypatch.setattr("bitwright_techniques.activation_ranges.normalizes_tokens", lambda graph: True)
    done = choose(model, data(model))
    assert set(done.outcome.encodings) == {"x"}
    left = len(simple_plan(model.graph).activations) - 1
    assert done.outcome.report.figures["left"] == left > 0
    assert f"{left} that no linear layer reads are left to calibration" in done.outcome.report.summary


def test_chosen_ranges_are_frozen_and_frozen_ones_stay():
    model = spiky()
    fixed = encoding_from_range(QuantSpec(8, signed=False, symmetric=False), -1.0, 1.0).with_(frozen=True)
    plan = simple_plan(model.graph)
    done = run_technique(ActivationRanges(), ReferenceBackend(), model, data(model), plan=plan, encodings={"x": fixed})
    assert "x" not in done.outcome.encodings
    assert all(e.frozen for e in done.outcome.encodings.values())
    only = choose(model, data(model), include=("x",))
    assert set(only.outcome.encodings) == {"x"}
    with pytest.raises(InputError, match="matches no activation"):
        choose(model, data(model), include=("nothing*",))


@pytest.mark.parametrize(("name", "bits"), [("scores", 8), ("sqnr", 16)])
def test_ends_are_those_of_all_values_where_a_scheme_keeps_them(name, bits):
    """Of a tensor of which histograms count some values: the same grids as calibration has."""
    b = Builder(0)
    model = b.build(b.activation("y", b.input("x", 3, 100, 100), "Tanh"))
    x = np.random.default_rng(0).normal(size=(2, 3, 100, 100)).astype(np.float32)
    x[0, 0, 0, 1] = 30.0  # the first of each sample is counted, the second isn't
    port = FRAMEWORKS["onnx"]
    sim, data = port.sim(model, activations=f"uint{bits}", scheme=name), [port.batch({"x": x})]
    (site, *_) = sim.plan.activations
    calibrated = sim.fork().calibrate(data).encodings[site]
    chosen = sim.fork().apply("activation_ranges", data, include=(site,), schemes=(name,)).encodings[site]
    assert chosen.maximum == calibrated.maximum >= 29.9
    mixed = sim.fork().apply("activation_ranges", data, include=(site,), schemes=("percentile:99.9", name))
    assert mixed.encodings[site].maximum in (chosen.maximum, pytest.approx(3.1, abs=0.2))


def test_unknown_schemes_are_refused_before_any_work():
    with pytest.raises(ValidationError, match="unknown calibration scheme"):
        ActivationRangesSettings(schemes=("minmax", "psychic"))
