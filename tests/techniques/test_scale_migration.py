"""SmoothQuant and AWQ: the float function stays, the measured error falls, what can't be scaled is said."""

from dataclasses import replace

import numpy as np
import pytest
from backends import BACKENDS, FRAMEWORKS
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import registry
from bitwright.grids import PerChannel, PerTensor, QuantSpec, encoding_of_weights
from bitwright.testing.builder import Builder
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.reference import ReferenceBackend
from bitwright_techniques import awq, smooth_quant
from bitwright_techniques.input_sample import InputSample
from bitwright_techniques.scale_migration import Channels, scale_inputs, scale_outputs
from bitwright_techniques.scale_paths import find_paths

INT8, ACT = QuantSpec(8, granularity=PerChannel(0)), QuantSpec(8, signed=False, symmetric=False)


def outlying(seed=0, *, spread=2.0):
    """Batch norm → ReLU → conv (grouped) → ReLU → flatten → linear, some channels far larger than others."""
    b = Builder(seed)
    gain = np.exp(b.rng.normal(0, spread, 8))
    x = b.batch_norm("bn", b.input("x", 8, 4, 4), gamma=gain, beta=0.1 * gain)
    x = b.relu("act1", x)
    size = (12, 4, 3, 3)
    x = b.conv("conv", x, 12, pad=1, groups=2, weight=b.rng.normal(0, 0.2, size) / gain.reshape(2, 1, 4, 1, 1).repeat(
        6, 1).reshape(12, 4, 1, 1))  # fmt: skip
    x = b.pool("pool", b.relu("act2", x), 2, stride=2)
    return b.build(b.linear("fc", b.flatten("flatten", x), 5))


def batches(model, n=3):
    from bitwright.testing import models

    return [models.batch(model, 8, s) for s in range(n)]


def run(name, model, weights=INT8, activations=ACT, backend=None, data=None, **options):
    backend, data = backend or ReferenceBackend(), data or batches(outlying())
    plan = simple_plan(backend.graph(model), weights=weights, activations=activations)
    return run_technique(registry.technique(name), backend, model, data, plan=plan, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["smooth_quant", "awq"])
def test_the_float_function_stays_and_quantized_outputs_come_nearer(backend, name):
    port, reference = BACKENDS[backend], outlying()
    model, b = port.port(reference), port.backend()
    weights = INT8 if name == "smooth_quant" else QuantSpec(3, granularity=PerChannel(0))
    activations = ACT if name == "smooth_quant" else None
    done = run(name, model, weights, activations, b, [port.batch(part) for part in batches(reference)])
    from bitwright.backend import Tap

    taps = [Tap(t) for t in b.graph(model).outputs]
    data = port.batch(batches(reference, 1)[0])
    (before,) = b.session(model, taps).run(data).values()
    (after,) = b.session(done.model, taps).run(data).values()
    assert np.allclose(after, before, atol=1e-4 * np.abs(before).max())
    plan, table = done.context.plan, done.context.encodings
    errors = []
    for m, e in ((model, table), (done.model, done.encodings)):
        (found,) = b.simulate(m, plan, e).session(taps).run(data).values()
        errors.append(np.square(np.asarray(found) - before).sum())
    assert errors[1] < 0.8 * errors[0]
    assert done.outcome.report.figures["scaled"] >= 1


def test_factors_are_those_of_the_papers():
    seen = Channels(np.array([4.0, 1.0, 0.0]), np.array([2.0, 0.5, 0.0]), np.array([0.25, 1.0, 1.0]))
    assert np.allclose(smooth_quant.factors(seen, 0.5), [4.0, 1.0, np.nan], equal_nan=True)
    assert np.allclose(smooth_quant.factors(seen, 1.0)[:2], [4.0, 1.0])
    assert np.allclose(awq.factors(seen, 0.5), [2**0.5, 0.5**0.5, np.nan], equal_nan=True)


def test_never_above_the_error_without_factors():
    done = run("smooth_quant", outlying(spread=0.0))
    for row in done.outcome.report.rows:
        if row[0] != "none":
            assert row[5] <= row[4]


def test_paths_cross_what_lets_factors_through_and_name_what_does_not():
    b = Builder()
    x = b.relu("act1", b.linear("first", b.input("x", 8), 8))
    gate = b.activation("gate_act", b.linear("gate", x, 8), "Sigmoid")
    up = b.linear("up", x, 8)
    x = b.linear("down", b.binary("mul", "Mul", gate, up), 8)
    y = b.clip("six", x)
    z = b.linear("behind_clip", y, 8)
    w = b.linear("skip", z, 8)
    model = b.build(b.linear("last", b.binary("add", "Add", z, w), 4))
    paths, missed = find_paths(model.graph, lambda op: None, lambda t: True)
    found = {p.source.id: [r.op.id for r in p.readers] for p in paths}
    assert found == {"first": ["gate", "up"], "up": ["down"]}
    assert set(missed) == {"first", "behind_clip", "skip", "last"}
    assert "model's input" in missed["first"]
    assert "'six' (Clip)" in missed["behind_clip"]
    assert "'add' (Add)" in missed["last"]
    _, missed = find_paths(model.graph, lambda op: "is frozen" if op.id == "up" else None, lambda t: True)
    assert missed["gate"] == missed["down"] == "is frozen"


@settings(max_examples=20)
@given(seed=st.integers(0, 99), groups=st.sampled_from([1, 2, 8]), transposed=st.booleans())
def test_scaling_inputs_undoes_scaling_outputs(seed, groups, transposed):
    b = Builder(seed)
    x = b.conv("first", b.input("x", 4, 5, 5), 8, transposed=transposed, stride=2 if transposed else 1)
    model = b.build(b.conv("second", x, 8, groups=groups, transposed=transposed))
    first, second = model.graph.linear_ops
    s = np.exp(b.rng.normal(size=8))
    params = dict(model.params)
    params["first.weight"] = scale_outputs(first, params["first.weight"], 1 / s)
    params["first.bias"] = (params["first.bias"] / s).astype(np.float32)
    params["second.weight"] = scale_inputs(second, params["second.weight"], s)
    from dataclasses import replace

    batch = {"x": b.rng.normal(size=(2, 4, 5, 5)).astype(np.float32)}
    (before,), (after,) = (m(batch).values() for m in (model, replace(model, params=params)))
    assert np.allclose(before, after, atol=1e-4 * np.abs(before).max())


def test_frozen_weights_are_left_alone():
    model = outlying()
    frozen = {"conv.weight": encoding_of_weights(model.params["conv.weight"], INT8).with_(frozen=True)}
    done = run("smooth_quant", model, encodings=frozen)
    assert "conv.weight" not in done.outcome.params
    assert any("frozen" in str(row[2]) for row in done.outcome.report.rows if row[1] == "conv")


def test_results_are_kept_for_resuming():
    from bitwright.testing.harness import MemoryStore

    store = MemoryStore()
    first = run("awq", outlying(), store=store)
    assert [k for k in store.entries if k.startswith("factors/")]
    again = run("awq", outlying(), store=store)
    assert all(np.array_equal(again.outcome.params[p], v) for p, v in first.outcome.params.items())


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), limit=st.integers(2, 50))
def test_samples_do_not_depend_on_batches(sizes, limit):
    op = Builder()
    model = op.build(op.linear("fc", op.input("x", 3), 2))
    fc = model.graph.linear_ops[0]
    x = np.arange(3 * sum(sizes), dtype=np.float32).reshape(-1, 3)
    whole, parts = InputSample(fc, 3, limit=limit), InputSample(fc, 3, limit=limit)
    whole.update(x)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        parts.update(part)
    assert np.array_equal(whole.columns, parts.columns)
    kept = whole.columns.shape[2]
    assert min(len(x), max(limit, 2) // 2) <= kept <= max(limit, 2)
    restored = InputSample(fc, 3, limit=limit)
    restored.restore(whole.state())
    assert np.array_equal(restored.columns, whole.columns)
    half, rest = InputSample(fc, 3, limit=limit), InputSample(fc, 3, limit=limit)
    half.update(x)
    rest.update(x[: len(x) // 2 + 1])
    half.merge(rest)
    assert half.columns.shape[2] <= max(limit, 2)
    assert half.seen == len(x) + len(x) // 2 + 1


@pytest.mark.parametrize("framework", [n for n in FRAMEWORKS if n == "torch"])
def test_layer_norms_absorb_factors(framework):
    """A pre-norm block with outliers, as in language models: the gain takes them."""
    torch = pytest.importorskip("torch")
    from torch import nn

    from bitwright.simulation import QuantSim

    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
            with torch.no_grad():
                gain = torch.ones(16)
                gain[[2, 9]] = 60.0
                self.norm.weight.copy_(gain)
                for layer in (self.q, self.k):
                    layer.weight.mul_(1 / gain)

        def forward(self, x):
            y = self.norm(x)
            return x + self.q(y) * torch.sigmoid(self.k(y))

    x = np.random.default_rng(0).normal(size=(24, 6, 16)).astype(np.float32)
    model = Block().eval()
    errors = []
    for recipe in ((), ("smooth_quant",)):
        sim = QuantSim(model, {"x": torch.from_numpy(x[:2])}, scheme="minmax")
        for name in recipe:
            sim.apply(name, {"x": x})
        sim.calibrate({"x": x})
        expected = model(torch.from_numpy(x)).detach().numpy()
        errors.append(np.square(sim.predict({"x": x})[0] - expected).sum())
    assert errors[1] < 0.3 * errors[0]


def test_per_tensor_weights_are_taken_into_account():
    done = run("smooth_quant", outlying(), weights=QuantSpec(8, granularity=PerTensor()))
    assert done.outcome.report.figures["scaled"] >= 1


@pytest.mark.parametrize("activations", [ACT, None, QuantSpec(16, float_format="bfloat16")])
def test_errors_on_moments_are_those_on_the_sample(activations):
    """Weights' errors are the same sums; noise of rounding is that of uniform errors, within a tenth."""
    from bitwright.statistics import LayerMoments, RangeStatistic
    from bitwright_techniques.input_sample import features_of, input_axis_of
    from bitwright_techniques.scale_migration import _Measured

    class Seen:
        pass

    backend, model = ReferenceBackend(), outlying()
    graph = backend.graph(model)
    plan = simple_plan(graph, weights=INT8, activations=activations)
    path = find_paths(graph, lambda op: None, lambda tensor: True)[0][0]
    reader, rng = path.readers[0], np.random.default_rng(0)
    # Without a border: its zeros are exact, and count as values.
    op = replace(reader.op, attrs=replace(reader.op.attrs, pads=((0, 0), (0, 0))))
    reader, axis = replace(reader, op=op), input_axis_of(graph, op)
    shape = graph.tensors[op.data_inputs[0]].shape
    x = (rng.normal(0, 1, (64, *shape[1:])) * np.exp(rng.normal(0, 1, (1, shape[1], 1, 1)))).astype(np.float32)
    one = InputSample(op, features_of(graph, op), axis, limit=10**6)
    other = LayerMoments(op, features_of(graph, op), axis, paired=False)
    extent = RangeStatistic(axis, reduction="none")
    for statistic in (one, other, extent):
        statistic.update(x)
    errors = []
    for seen in (one, other):
        ctx = Seen()
        ctx.statistics, ctx.plan, ctx.params = {f"sample/{op.id}": seen, f"range/{op.id}": extent}, plan, model.params
        measured = _Measured(ctx, reader, quantized=True)
        errors.append([measured.error(f) for f in (np.ones(path.channels), np.linspace(0.5, 2, path.channels))])
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-4 if activations is None else 0.1)
