"""Batch-norm re-estimation and folding to scale: what follows quantization-aware training."""

import numpy as np
import pytest

from bitwright.backend import Tap
from bitwright.errors import InputError
from bitwright.graph import OpKind, ParamRole, SetParams
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec, encoding_of_weights
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.reference import ReferenceBackend
from bitwright.testing.technique_contract import TechniqueContract
from bitwright_techniques.batch_norm_reestimation import BatchNormReestimation
from bitwright_techniques.fold_batch_norm_to_scale import FoldBatchNormToScale

BACKEND = ReferenceBackend()


class TestBatchNormReestimation(TechniqueContract):
    def technique(self):
        return BatchNormReestimation()


class TestFoldBatchNormToScale(TechniqueContract):
    needs_data = False
    test_leaves_frozen_grids_alone = None  # trained grids are frozen, and are scaled with their weights: its purpose

    def technique(self):
        return FoldBatchNormToScale()


def one_norm(**numbers):
    b = Builder(0)
    x = b.batch_norm("bn", b.conv("conv", b.input("x", 3, 6, 6), 4, 3, pad=1), **numbers)
    return b.build(b.relu("relu", x))


def test_statistics_are_those_of_the_simulated_input():
    model = one_norm()
    batches = [models.batch(model, 8, seed=i) for i in range(3)]
    done = run_technique(BatchNormReestimation(), BACKEND, model, batches)
    norm = next(op for op in model.graph if op.kind is OpKind.BATCH_NORM)
    session = BACKEND.simulate(model, done.context.plan, done.context.encodings).session([Tap(norm.data_inputs[0])])
    seen = np.concatenate([session.run(b)[Tap(norm.data_inputs[0])] for b in batches]).astype(np.float64)
    params = done.outcome.params
    np.testing.assert_allclose(params[norm.params[ParamRole.MEAN]], seen.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(params[norm.params[ParamRole.VAR]], seen.var((0, 2, 3)), rtol=1e-5)
    assert set(params) == {norm.params[ParamRole.MEAN], norm.params[ParamRole.VAR]}


def test_batches_may_be_split_anyhow():
    model = one_norm()
    batch = models.batch(model, 12)
    whole = run_technique(BatchNormReestimation(), BACKEND, model, [batch])
    parts = [{k: v[i : i + 5] for k, v in batch.items()} for i in (0, 5, 10)]
    split = run_technique(BatchNormReestimation(), BACKEND, model, parts, encodings=whole.context.encodings)
    for p, value in whole.outcome.params.items():
        np.testing.assert_allclose(split.outcome.params[p], value, rtol=1e-5)


def test_momentum_mixes_old_and_new():
    model = one_norm(mean=np.zeros(4), var=np.ones(4))
    batch = models.batch(model, 8)
    full = run_technique(BatchNormReestimation(), BACKEND, model, [batch])
    half = run_technique(BatchNormReestimation(), BACKEND, model, [batch], momentum=0.5)
    mean, var = (next(op for op in model.graph if op.id == "bn").params[r] for r in (ParamRole.MEAN, ParamRole.VAR))
    np.testing.assert_allclose(half.outcome.params[mean], full.outcome.params[mean] / 2, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(half.outcome.params[var], full.outcome.params[var] / 2 + 0.5, rtol=1e-6)
    for momentum in (0.0, 1.5):
        with pytest.raises(ValueError, match="momentum"):
            run_technique(BatchNormReestimation(), BACKEND, model, [batch], momentum=momentum)
    with pytest.raises(InputError, match="no batch norm 'nb'; it has bn"):
        run_technique(BatchNormReestimation(), BACKEND, model, [batch], norms=("bn", "nb"))


SPECS = {
    "int4 channels": QuantSpec(4, granularity=PerChannel(0)),
    "uint4 channels": QuantSpec(4, signed=False, symmetric=False, granularity=PerChannel(0)),
    "strict int8": QuantSpec(8, strict=True, granularity=PerChannel(0)),
    "blocks": QuantSpec(4, granularity=Blockwise(0, 1, 1)),
    "lpbq": QuantSpec(4, granularity=Blockwise(0, 1, 1, 8)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("signs", ["positive", "mixed"])
def test_codes_stay(spec, signs):
    gamma = np.array([0.5, 2.0, 1.0, 3.0]) * (np.array([1, -1, 1, -1]) if signs == "mixed" else 1)
    model = one_norm(gamma=gamma)
    weight = model.graph.op("conv").weight
    frozen = encoding_of_weights(model.params[weight], spec).with_(frozen=True)
    batch = models.batch(model, 8)
    plan = simple_plan(model.graph, weights=spec, activations=None)
    done = run_technique(FoldBatchNormToScale(), BACKEND, model, [batch], plan=plan, encodings={weight: frozen})
    assert not any(op.kind is OpKind.BATCH_NORM for op in done.model.graph)
    after = done.outcome.encodings[weight]
    assert after.frozen
    before, now = frozen.quantize(model.params[weight]), after.quantize(done.model.params[weight])
    expected = before.copy()
    for channel in np.flatnonzero(gamma < 0):
        mirrored = frozen.grid.qmin + frozen.grid.qmax - before[channel]
        expected[channel] = mirrored if not spec.symmetric else np.minimum(-before[channel], frozen.grid.qmax)
    # Values near a midpoint may round to the other side after their scale's own rounding.
    assert np.mean(now != expected) <= 0.02
    rounded = BACKEND.edit(model, [SetParams({weight: frozen.fake_quantize(model.params[weight])})])
    folded = BACKEND.edit(done.model, [SetParams({weight: after.fake_quantize(done.model.params[weight])})])
    if signs == "positive":
        for t, value in rounded(batch).items():
            np.testing.assert_allclose(folded(batch)[t], value, rtol=1e-4, atol=1e-4 * np.abs(value).max())


def test_of_two_norms_after_a_layer_both_scale_it():
    b = Builder(0)
    x = b.conv("conv", b.input("x", 3, 6, 6), 4, 3, bias=False)
    model = b.build(b.batch_norm("bn1", b.batch_norm("bn0", x)))
    weight = model.graph.op("conv").weight
    frozen = encoding_of_weights(model.params[weight], SPECS["int4 channels"]).with_(frozen=True)
    plan = simple_plan(model.graph, weights=SPECS["int4 channels"], activations=None)
    done = run_technique(
        FoldBatchNormToScale(), BACKEND, model, [models.batch(model, 4)], plan=plan, encodings={weight: frozen}
    )
    assert not any(op.kind is OpKind.BATCH_NORM for op in done.model.graph)
    before = frozen.quantize(model.params[weight])
    assert np.mean(done.outcome.encodings[weight].quantize(done.model.params[weight]) != before) <= 0.02


def test_per_tensor_grids_keep_their_norm():
    model = one_norm(gamma=np.array([0.5, 2.0, 1.0, 3.0]))
    plan = simple_plan(model.graph, weights=QuantSpec(8, granularity=PerTensor()), activations=None)
    done = run_technique(FoldBatchNormToScale(), BACKEND, model, [models.batch(model, 4)], plan=plan)
    assert any(op.kind is OpKind.BATCH_NORM for op in done.model.graph)
    assert done.outcome.encodings == {}
    assert "frozen" in done.outcome.report.rows[0][-1]


def test_norms_are_measured_one_after_another():
    """Each in the network that holds the new statistics of those before it, so a second run changes nothing."""
    b = Builder(0)
    x = b.input("x", 3, 6, 6)
    for i in range(3):
        x = b.relu(f"relu{i}", b.batch_norm(f"bn{i}", b.conv(f"conv{i}", x, 3 if i == 0 else 4, 3, pad=1)))
    model = b.build(x)
    technique, data = BatchNormReestimation(), [models.batch(model, 16)]
    stages = technique.stages(model.graph, simple_plan(model.graph), technique.Settings())
    assert [s.norms for s in stages] == [("bn0",), ("bn1",), ("bn2",)]
    plan = simple_plan(model.graph, activations=None)
    again = model
    for _ in range(2):
        changed = again
        for stage in stages:
            changed = run_technique(technique, BACKEND, changed, data, plan=plan, **stage.model_dump()).model
        first, again = again, changed
    for p, value in again.params.items():
        np.testing.assert_allclose(value, first.params[p], rtol=1e-5, atol=1e-6, err_msg=p)
