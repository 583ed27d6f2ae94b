from math import erf, exp, pi, sqrt

import numpy as np
import pytest

from bitwright.backend import Tap
from bitwright.errors import InputError
from bitwright.graph import columns
from bitwright.grids import PerChannel, QuantSpec
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.reference import ReferenceBackend
from bitwright_techniques.bias_correction import BiasCorrection
from bitwright_techniques.cross_layer_equalization import CrossLayerEqualization
from bitwright_techniques.expected_inputs import ExpectedInputs, clipped_normal
from bitwright_techniques.fold_batch_norm import FoldBatchNorm

BACKEND = ReferenceBackend()
INT4 = QuantSpec(4)


def correct(model, data=(), **options):
    return run_technique(BiasCorrection(), BACKEND, model, data, **options)


@pytest.mark.parametrize("high", [6.0, np.inf])
def test_clipped_normal_matches_sampling(high):
    rng = np.random.default_rng(0)
    mean, std = np.array([-2.0, -0.3, 0.0, 1.0, 5.5, 3.0]), np.array([1.0, 0.5, 2.0, 1.0, 2.0, 0.0])
    x = np.clip(rng.normal(mean, std, (400_000, 6)), 0, high)
    expected, spread = clipped_normal(mean, std, 0.0, high)
    assert np.allclose(expected, x.mean(axis=0), atol=1e-2)
    assert np.allclose(spread, x.std(axis=0), atol=1e-2)


def test_relu_mean_is_the_papers_formula():
    beta, gamma = 0.7, 1.3
    z = -beta / gamma
    formula = beta * (1 - 0.5 * (1 + erf(z / sqrt(2)))) + gamma * exp(-z * z / 2) / sqrt(2 * pi)
    assert clipped_normal(np.array([beta]), np.array([gamma]), 0.0)[0][0] == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize(
    "name", ["conv_bn_relu", "depthwise_triple", "residual", "concat_branches", "mlp", "transposed"]
)
@pytest.mark.parametrize("activations", [None, QuantSpec(8, signed=False, symmetric=False)])
def test_mean_output_errors_vanish(name, activations):
    model = run_technique(FoldBatchNorm(), BACKEND, models.MODELS[name](1)).model
    rng = np.random.default_rng(0)
    data = [
        {t: np.abs(v) + rng.normal(0, 0.1, v.shape).astype(np.float32) for t, v in b.items()}
        for b in (models.batch(model, 12, s) for s in range(2))
    ]
    plan = simple_plan(model.graph, weights=INT4, activations=activations)
    done = correct(model, data, plan=plan)
    assert done.outcome.report.figures["corrected"] == len(model.graph.linear_ops)

    def errors(applied):
        # Seen before the layer's own output quantizer: that one comes after the bias.
        found = {}
        for op in applied.graph.linear_ops:
            simulation = BACKEND.simulate(applied, plan, done.context.encodings)
            simulation.set({op.output: None})
            tap = Tap(op.output)
            sessions = simulation.session([tap]), BACKEND.session(model, [tap])
            runs = [[np.asarray(s.run(b)[tap], np.float64) for b in data] for s in sessions]
            simulated, float_ = (np.concatenate(r) for r in runs)
            axis = applied.graph.tensors[op.output].channel_axis or 1
            over = tuple(i for i in range(simulated.ndim) if i != axis % simulated.ndim)
            found[op.id] = np.abs((simulated - float_).mean(axis=over)).max()
        return found

    before, after = errors(model), errors(done.model)
    assert max(after.values()) <= 1e-3 * max(before.values())
    assert all(after[op] <= 1e-2 * before[op] + 1e-6 for op in before)
    weights = [op.weight for op in model.graph.linear_ops]
    for w in weights:
        assert np.array_equal(BACKEND.read(done.model, [w])[w], BACKEND.read(model, [w])[w])


def test_biases_are_made_where_there_are_none():
    model = models.mlp(2)
    data = [models.batch(model, 16)]
    done = correct(model, data, plan=simple_plan(model.graph, weights=INT4))
    assert [e.op for e in done.outcome.edits] == ["fc2"]
    assert "fc2.bias" in done.model.params


def _standardized_net(seed=0, relu6=False):
    """Each batch norm's statistics are those of its input, as in a trained network."""
    b = Builder(seed)
    x = b.input("x", 6)
    for i in (1, 2, 3):
        x = b.linear(f"fc{i}", x, 24, bias=False)
        x = b.batch_norm(f"bn{i}", x, mean=np.zeros(24), var=np.ones(24))
        x = b.clip(f"act{i}", x, 0, 2.0) if relu6 else b.relu(f"act{i}", x)
    model = b.build(b.linear("head", x, 4))
    data = models.batch(model, 4000, seed)
    params = dict(model.params)
    for i in (1, 2, 3):
        tap = Tap(f"fc{i}.output")
        current = type(model)(model.graph, params, model.perms)
        y = BACKEND.session(current, [tap]).run(data)[tap]
        params[f"bn{i}.mean"], params[f"bn{i}.var"] = y.mean(axis=0), y.var(axis=0)
    return type(model)(model.graph, params, model.perms), data


@pytest.mark.parametrize("relu6", [True, False])
def test_analytic_means_are_close_to_measured_ones(relu6):
    model, data = _standardized_net(relu6=relu6)
    folded = run_technique(FoldBatchNorm(), BACKEND, model)
    expected = ExpectedInputs(folded.model.graph, folded.outcome.folded)
    for op in folded.model.graph.linear_ops[1:]:
        tap = Tap(op.data_inputs[0])
        x = BACKEND.session(folded.model, [tap]).run(data)[tap]
        measured = np.mean([c.mean(axis=2) for c in columns(op, x)], axis=0)
        assert np.abs(expected.columns(op) - measured).max() < 0.12
    assert not expected.columns(folded.model.graph.linear_ops[0]).any()


def test_analytic_lowers_the_mean_error_without_data():
    model, data = _standardized_net(3)
    folded = run_technique(FoldBatchNorm(), BACKEND, model)
    plan = simple_plan(folded.model.graph, weights=INT4, activations=None)
    done = correct(folded.model, folded=folded.outcome.folded, plan=plan)
    assert done.outcome.report.summary == "corrected 4 of 4 biases (analytic)"
    reference = folded.model(data)["head.output"].mean(axis=0)

    def shift(m):
        simulated = BACKEND.simulate(m, plan, done.context.encodings).model(data)["head.output"]
        return np.abs(simulated.mean(axis=0) - reference).max()

    assert shift(done.model) < 0.5 * shift(folded.model)


def test_analytic_after_equalization_uses_scaled_statistics():
    model, data = _standardized_net(4)
    folded = run_technique(FoldBatchNorm(), BACKEND, model)
    equal = run_technique(CrossLayerEqualization(), BACKEND, folded.model, folded=folded.outcome.folded)
    known = {**folded.outcome.folded, **equal.outcome.folded}
    expected = ExpectedInputs(equal.model.graph, known)
    for op in equal.model.graph.linear_ops[1:]:
        tap = Tap(op.data_inputs[0])
        x = BACKEND.session(equal.model, [tap]).run(data)[tap]
        assert np.abs(expected.columns(op)[0] - x.mean(axis=0)).max() < 0.1 * max(1, x.std())


@pytest.mark.parametrize("transposed", [False, True])
def test_analytic_covers_convolutions_sums_concatenation_and_pooling(transposed):
    b = Builder(5)
    x = b.input("x", 3, 8, 8)
    p = b.relu("r1", b.batch_norm("bn1", b.conv("c1", x, 4)))
    q = b.batch_norm("bn2", b.conv("c2", x, 4))
    s = b.relu("r3", b.binary("add", "Add", p, q))
    s = b.conv("c3", s, 6, groups=2, transposed=transposed, stride=2)
    c = b.concat("cat", [p, q])
    f = b.flatten("flat", b.global_pool("gap", c))
    model = b.build(s, b.linear("fc", f, 3))
    folded = run_technique(FoldBatchNorm(), BACKEND, model)
    done = correct(folded.model, folded=folded.outcome.folded, plan=simple_plan(folded.model.graph, weights=INT4))
    assert done.outcome.report.figures["corrected"] == 4
    assert done.outcome.report.figures["left"] == 0
    expected = ExpectedInputs(folded.model.graph, folded.outcome.folded)
    op = folded.model.graph.op("fc")
    beta1, beta2 = (folded.outcome.folded[c][1] for c in ("c1", "c2"))
    assert np.allclose(expected.columns(op)[0, 4:], beta2)
    assert (expected.columns(op)[0, :4] >= np.maximum(beta1, 0)).all()


def test_errors_say_what_to_do():
    model = models.mlp()
    with pytest.raises(InputError, match="calibration data"):
        correct(model, mode="empirical")
    with pytest.raises(InputError, match="fold_batch_norm"):
        correct(model)
    with pytest.raises(ValueError, match="mode"):
        correct(model, mode="magic")


def test_per_channel_weights_and_grouped_layers():
    model = models.MODELS["transposed"](4)
    spec = QuantSpec(4, granularity=PerChannel(0))
    data = [models.batch(model, 8)]
    done = correct(model, data, plan=simple_plan(model.graph, weights=spec))
    assert done.outcome.report.figures["corrected"] == 3
