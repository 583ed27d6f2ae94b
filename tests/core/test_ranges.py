"""Range setting of a plan: which values histograms count, whose grids biases get, and what makes room for them."""

from __future__ import annotations

from math import gcd

import numpy as np
import pytest

from bitwright.backend import ParamReader
from bitwright.calibration._ranges import (
    COUNTED,
    LIMIT,
    activation_encodings,
    activation_requests,
    bias_encoding,
    fits_accumulator,
    full_table,
    guarded,
    quantized_weights,
    weight_encodings,
)
from bitwright.data._dataset import ArrayDataset
from bitwright.errors import EncodingError
from bitwright.grids import EncodingTable, PerChannel, PerTensor, QuantSpec, encoding_from_range
from bitwright.placement import build_plan
from bitwright.statistics import HistogramStatistic, RangeStatistic
from bitwright.testing import models
from bitwright.testing.builder import Builder
from bitwright.testing.harness import Quiet
from bitwright.testing.reference import ReferenceBackend


def grid(low, high, bits=8, **options):
    return encoding_from_range(QuantSpec(bits, **options), np.asarray(low, float), np.asarray(high, float))


def made(shape, chosen):
    """The statistic of an input of that shape, calibrated by a scheme."""
    b = Builder(0)
    x = b.input("x", *shape)
    graph = b.build(b.activation("y", x, "Tanh")).graph
    plan = build_plan(graph, "default", scheme=chosen)
    (request,) = activation_requests(graph, plan, ["x"])
    assert request.tensors == ("x",) and request.key == "x\0x"
    return request.make()


@pytest.mark.parametrize(
    ("shape", "step"),
    [
        ((3, 224, 224), 19),  # 150 528 values: every 18th would meet one channel's columns more often than others
        ((64, 56, 56), 25),  # 200 704, 24 has divisors in common with all
        ((8192,), 1),
        ((16384,), 3),
        ((8193,), 1),
        ((2, 3), 1),
    ],
)
def test_histograms_of_large_tensors_count_some_values_of_each_sample(shape, step):
    """About 8,192 of each sample, in steps that share no divisor with any dimension."""
    assert COUNTED == 8192
    statistic = made(shape, "sqnr")
    assert isinstance(statistic, HistogramStatistic) and statistic.axis is None
    assert statistic.step == step and all(gcd(step, d) == 1 for d in shape)
    counted = int(np.prod(shape)) / step
    assert counted >= min(np.prod(shape), 0.6 * COUNTED)
    assert counted < 2 * COUNTED
    assert statistic.layout == 1


def test_extremes_are_asked_for_by_schemes_that_keep_them_and_only_of_some_values():
    assert made((3, 224, 224), "scores").extremes
    assert not made((3, 224, 224), "sqnr").extremes and not made((3, 224, 224), "percentile:99").extremes
    assert not made((3, 16), "scores").extremes, "all values are counted"
    assert isinstance(made((3, 224, 224), "minmax"), RangeStatistic)
    assert isinstance(made((3, 224, 224), "percentile:100"), RangeStatistic), "the same as min-max"


def test_unknown_shapes_are_counted_whole():
    from bitwright.calibration._ranges import sampled
    from bitwright.graph import Tensor

    for shape in (None, (None,), (4,), (None, None, 100_000)):
        statistic = sampled(lambda: HistogramStatistic(None), Tensor("t", shape, "float32"))()
        assert statistic.step == 1
    per_channel = sampled(lambda: HistogramStatistic(1), Tensor("t", (None, 3, 400, 400), "float32"))()
    assert per_channel.step == 1


def test_a_bias_has_the_accumulators_grid():
    inputs = grid(-1, 3, signed=False, symmetric=False)
    weight = grid([-1, -4], [2, 1], granularity=PerChannel(0))
    found = bias_encoding(inputs, weight)
    assert (found.bits, found.signed, found.symmetric, found.source) == (32, True, True, "bias")
    assert found.granularity == PerChannel(0) and found.zero_point.tolist() == [0, 0]
    assert np.array_equal(found.scale, inputs.scale * weight.scale) and found.scale.dtype == np.float32
    whole = bias_encoding(inputs, grid(-1, 1))
    assert whole.granularity == PerTensor() and whole.scale.shape == ()
    tiny = bias_encoding(inputs.with_(scale=np.float32(1e-30)), weight.with_(scale=np.float32([1e-30, 1])))
    assert tiny.scale[0] == np.finfo(np.float32).tiny
    assert bias_encoding(grid([-1, -1], [1, 1], granularity=PerChannel(1)), weight) is None
    half = QuantSpec(16, float_format="float16")
    assert bias_encoding(inputs, encoding_from_range(half, np.array(-1.0), np.array(1.0))) is None
    assert bias_encoding(encoding_from_range(half, np.array(-1.0), np.array(1.0)), weight) is None


def linear():
    b = Builder(0)
    x = b.input("x", 4)
    graph = b.build(b.linear("fc", x, 2)).graph
    plan = build_plan(graph, "default")
    weight, bias = (next(s for s in plan if s.endswith(end)) for end in (".weight", ".bias"))
    return plan, weight, bias


def test_weight_scales_leave_room_for_the_bias():
    """s_w ≥ |bias| / (s_x · 2**30), channel by channel; scales that have room stay as they are."""
    plan, weight, bias = linear()
    inputs = grid(0, 255, signed=False, symmetric=False)
    assert float(inputs.scale) == 1 and LIMIT == 2**30
    table = EncodingTable({"x": inputs, weight: grid([-1, -1e-12], [1, 1e-12], granularity=PerChannel(0))})
    values = np.array([5.0, -800.0])
    found = guarded(plan, table, {bias: values})
    assert found[weight].scale[0] == table[weight].scale[0]
    assert found[weight].scale[1] == pytest.approx(800 / 2**30, rel=1e-5)
    codes = np.abs(values) / (float(inputs.scale) * found[weight].scale.astype(float))
    assert (codes <= 2**30).all() and codes[1] == pytest.approx(2**30, rel=1e-5)
    assert guarded(plan, table, {bias: np.array([5.0, 0.0])}) is table
    one = EncodingTable({"x": inputs, weight: grid(-1e-12, 1e-12)})
    assert float(guarded(plan, one, {bias: values})[weight].scale) == pytest.approx(800 / 2**30, rel=1e-5)


def test_a_bias_fits_up_to_the_accumulator_s_largest_code():
    one = np.array([1.0])
    assert fits_accumulator(np.array([-(2.0**31 - 1)]), one, one)
    assert not fits_accumulator(np.array([2.0**31]), one, one)


def test_a_table_says_which_site_has_no_encoding():
    plan, weight, _ = linear()
    with pytest.raises(EncodingError, match="has no encoding yet: call calibrate"):
        full_table(plan, EncodingTable({weight: grid([-1, -1], [1, 1], granularity=PerChannel(0))}))


def test_a_grid_that_tensors_share_covers_the_values_of_each():
    b = Builder(0)
    x = b.input("x", 4, 6, 6)
    small, large, third = (b.binary(n, "Mul", x, v) for n, v in (("small", 0.5), ("large", 7.0), ("third", 0.1)))
    model = b.build(b.concat("left", [small, third]), b.concat("right", [small, large]))
    backend = ReferenceBackend()
    plan = build_plan(backend.graph(model), "default", scheme="minmax")
    (root,) = {plan.root(t) for t in (small, large, third)}
    assert set(plan.observed(root)) == {"left.output", "right.output"}, "what two concatenations read ties them"
    data = np.random.default_rng(0).standard_normal((8, 4, 6, 6)).astype(np.float32)
    found = activation_encodings(backend, model, plan, model.params, {}, ArrayDataset({"x": data}, 4), Quiet())[root]
    step = float(found.scale)
    assert float(found.minimum) == pytest.approx(7 * data.min(), abs=step)
    assert float(found.maximum) == pytest.approx(7 * data.max(), abs=step)


def test_rounded_weights_are_put_into_a_model_some_at_a_time(monkeypatch):
    """Never more of them are held than the limit and one; the model is that of one edit."""
    model, backend = models.conv_bn_relu(depth=4), ReferenceBackend()
    graph = backend.graph(model)
    plan = build_plan(graph, "default", weights="int4")
    table = weight_encodings(plan, ParamReader(backend, model, graph), EncodingTable())
    edit, sizes = backend.edit, []

    def counted(native, edits):
        sizes.append([v.nbytes for e in edits for v in e.values.values()])
        return edit(native, edits)

    monkeypatch.setattr(backend, "edit", counted)
    whole = backend.read(quantized_weights(backend, model, table), list(graph.params))
    assert len(sizes) == 1
    limit = 1500
    monkeypatch.setattr("bitwright.calibration._ranges.ROUNDED_BYTES", limit)
    sizes.clear()
    parts = backend.read(quantized_weights(backend, model, table), list(graph.params))
    assert len(sizes) > 2
    assert all(sum(some[:-1]) < limit for some in sizes)
    for id, values in whole.items():
        np.testing.assert_array_equal(parts[id], values, err_msg=id)
        assert id not in table or np.array_equal(values, table[id].fake_quantize(backend.read(model, [id])[id]))
