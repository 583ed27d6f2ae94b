"""SeqMSE: exact candidate costs, guarantees against the largest candidate, layouts, input modes."""

from typing import ClassVar

import numpy as np
import pytest
from layers import KINDS, W4, make_layer

from bitwright.errors import EncodingError
from bitwright.graph import to_matrix
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec, encoding_of_weights
from bitwright.testing import models
from bitwright.testing.harness import run_technique, simple_plan
from bitwright.testing.reference import ReferenceBackend
from bitwright.testing.technique_contract import TechniqueContract
from bitwright_techniques.reconstruction import reconstruction
from bitwright_techniques.scale_search import full_range, search_scales
from bitwright_techniques.seq_mse import SeqMse, SeqMseSettings, scale_layer
from bitwright_techniques.weight_grid import WeightGrid

SPECS = {
    "per_channel": W4,
    "per_tensor": QuantSpec(4, granularity=PerTensor()),
    "asymmetric": QuantSpec(4, signed=False, symmetric=False, granularity=PerChannel(0)),
    "input_channels": QuantSpec(4, granularity=PerChannel(1)),
    "strict": QuantSpec(3, strict=True, granularity=PerChannel(0)),
    "blockwise": QuantSpec(4, granularity=Blockwise(0, 1, 2)),
}


def row_losses(layer, encoding, **kwargs):
    problem = reconstruction(layer.op, layer.weight, layer.moments, damping=0.0, **kwargs)
    return problem.loss(to_matrix(layer.op, encoding.fake_quantize(layer.weight)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["per_channel", "per_tensor"])
def test_finds_the_best_of_all_candidates(kind, name):
    layer = make_layer(kind, spec=SPECS[name], noise=0.2)
    result = scale_layer(layer, SeqMseSettings(inputs="quantized"))
    full = encoding_of_weights(layer.weight, SPECS["per_tensor"]) if name == "per_tensor" else layer.encoding
    table = np.stack(
        [
            row_losses(layer, full.with_(scale=full.scale * np.float32(i / 20)), inputs="quantized", free_bias=False)
            for i in range(1, 21)
        ]
    )
    reached = row_losses(layer, result.encoding, inputs="quantized", free_bias=False)
    if name == "per_tensor":
        assert np.isclose(reached.sum(), table.sum(axis=(1, 2)).min(), rtol=1e-5)
    elif kind == "transposed":  # a channel's scale serves both groups
        assert np.allclose(reached.sum(axis=0), table.sum(axis=1).min(axis=0), rtol=1e-5)
    else:
        assert np.allclose(reached, table.min(axis=0), rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("inputs", ["quantized", "float", "asymmetric"])
def test_never_worse_than_the_largest_candidate(kind, name, inputs):
    spec = SPECS[name]
    if kind == "grouped" and name == "blockwise":
        spec = QuantSpec(4, granularity=Blockwise(0, 1, 3))
    layer = make_layer(kind, spec=spec, noise=0.3)
    result = scale_layer(layer, SeqMseSettings(inputs=inputs))
    before = row_losses(layer, layer.encoding, inputs=inputs, free_bias=False)
    after = row_losses(layer, result.encoding, inputs=inputs, free_bias=False)
    assert after.sum() <= before.sum()
    if name not in ("per_tensor", "input_channels"):
        assert (after <= before * (1 + 1e-5)).all()
    assert result.encoding.frozen
    assert result.encoding.source == "seq_mse"
    assert np.array_equal(result.encoding.zero_point, layer.encoding.zero_point)
    assert np.array_equal(result.weight, result.encoding.fake_quantize(layer.weight))
    assert result.bias is None


def test_blocks_are_searched_with_the_others_errors_in_view():
    layer = make_layer("linear", spec=QuantSpec(4, granularity=Blockwise(0, 1, 3)))
    problem = reconstruction(layer.op, layer.weight, layer.moments, free_bias=False, damping=0.0)
    grid = search_scales(problem, WeightGrid.of(layer.op, layer.weight.shape, layer.encoding))
    reached = problem.objective(grid.values(grid.nearest(problem.weight)))
    # No other candidate for a single block lowers the whole row's error.
    for block in range(4):
        for i in range(1, 21):
            scale = grid.scale.reshape(6, 4).copy()
            scale[:, block] = layer.encoding.scale[:, block] * np.float32(i / 20)
            other = grid.with_scale(scale.reshape(-1))
            assert (problem.objective(other.values(other.nearest(problem.weight))) >= reached * (1 - 1e-5)).all()


def test_lpbq_scales_stay_integer_multiples():
    layer = make_layer("linear", spec=QuantSpec(4, granularity=Blockwise(0, 1, 4, 8)))
    result = scale_layer(layer, SeqMseSettings())
    e = result.encoding
    assert e.block_scale.min() >= 1
    assert e.block_scale.max() <= 16
    unit = (e.scale / e.block_scale)[:, :1].astype(np.float32)
    assert np.allclose(e.scale, e.block_scale * unit, rtol=2e-7, atol=0)
    before, after = (row_losses(layer, x, inputs="quantized", free_bias=False) for x in (layer.encoding, e))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


def test_blocks_across_groups_are_refused():
    layer = make_layer("transposed", spec=QuantSpec(4, granularity=Blockwise(1, 0, 2)))
    with pytest.raises(EncodingError, match="straddles the groups"):
        scale_layer(layer, SeqMseSettings())


def test_refinement_lowers_the_error_further():
    layer = make_layer("conv")
    coarse = scale_layer(layer, SeqMseSettings(candidates=5))
    fine = scale_layer(layer, SeqMseSettings(candidates=5, refinements=4))
    assert fine.figures["after"] < coarse.figures["after"]


def test_search_starts_from_the_full_range_not_from_the_current_encoding():
    layer = make_layer("conv")
    shrunk = make_layer("conv")
    shrunk.encoding = shrunk.encoding.with_(scale=shrunk.encoding.scale * np.float32(0.1))
    a, b = scale_layer(layer, SeqMseSettings()), scale_layer(shrunk, SeqMseSettings())
    assert a.encoding.equals(b.encoding)
    assert b.figures["after"] < b.figures["before"]


def test_scales_of_a_grid_without_error_stay():
    layer = make_layer("conv")
    layer.weight = layer.encoding.fake_quantize(layer.weight)
    layer.encoding = encoding_of_weights(layer.weight, W4)
    assert scale_layer(layer, SeqMseSettings()).encoding.equals(layer.encoding)


def test_zero_channels_and_dead_inputs():
    weight = make_layer("depthwise").weight.copy()
    weight[0] = 0
    weight[1] *= 1e-8
    x = np.random.default_rng(0).normal(size=(4, 8, 5, 5)).astype(np.float32)
    x[:, 2] = 0
    layer = make_layer("depthwise", weight=weight, x=x)
    result = scale_layer(layer, SeqMseSettings())
    assert np.isfinite(result.weight).all()
    assert (result.encoding.scale > 0).all()
    assert result.encoding.scale[0] == layer.encoding.scale[0]


def test_bias_correction_keeps_the_mean():
    layer = make_layer("linear")
    result = scale_layer(layer, SeqMseSettings(bias_correction=True))
    mean = layer.moments.mean[0]
    assert np.allclose(layer.weight @ mean + layer.bias, result.weight @ mean + result.bias, atol=1e-5)


def test_weights_stay_excluded_and_frozen_layers_are_unchanged():
    model = models.mlp()
    backend = ReferenceBackend()
    first, *rest = model.graph.linear_ops
    plan = simple_plan(model.graph, weights=W4)
    frozen = encoding_of_weights(model.params[rest[0].weight], W4).with_(frozen=True)
    done = run_technique(
        SeqMse(), backend, model, [models.batch(model)], plan=plan,
        encodings={rest[0].weight: frozen}, exclude=(first.id,),
    )  # fmt: skip
    assert not done.outcome.params
    assert first.weight not in done.outcome.encodings
    assert rest[0].weight not in done.outcome.encodings
    assert set(done.outcome.encodings) == {op.weight for op in rest[1:]}
    reasons = {row[0]: str(row[1]) for row in done.outcome.report.rows}
    assert reasons[first.id] == "excluded"
    assert "frozen" in reasons[rest[0].id]


def test_full_range_covers_the_weight():
    layer = make_layer("conv")
    grid = full_range(WeightGrid.of(layer.op, layer.weight.shape, layer.encoding), layer.weight)
    assert np.array_equal(grid.scale, layer.encoding.scale)


class TestSeqMse(TechniqueContract):
    reconstructs = True
    settings: ClassVar = {"inputs": "asymmetric", "quantized_activations": True}

    def technique(self):
        return SeqMse()
