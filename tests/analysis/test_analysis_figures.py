from __future__ import annotations

import numpy as np
import pytest
from analysis_models import conv_model, onnx
from hypothesis import given
from hypothesis import strategies as st

from bitwright import QuantSim
from bitwright.backend import Tap
from bitwright.data import FirstSamples
from bitwright.graph import ConvAttrs, Graph, Op, OpKind, Param, ParamRole, Tensor
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec, encoding_from_range, encoding_of_weights
from bitwright.progress import Silent
from bitwright.statistics import HistogramStatistic
from bitwright.verify._integer import IntegerSimulation
from bitwright_analysis.accumulators import accumulators, overflowing, width_of
from bitwright_analysis.distributions import activation_distributions, cumulative, parameter_distributions
from bitwright_analysis.imbalance import equalized, imbalances, input_ranges, output_ranges, precision
from bitwright_analysis.layer_errors import TensorError, packed
from bitwright_analysis.scoring import Power
from bitwright_analysis.sweeps import layer_of, units

UINT8 = QuantSpec(8, signed=False, symmetric=False)


def linear(weight, bias=None, kind=OpKind.LINEAR, attrs=None):
    params = {ParamRole.WEIGHT: "w", **({ParamRole.BIAS: "b"} if bias is not None else {})}
    op = Op("op", kind, "Gemm" if kind is OpKind.LINEAR else "Conv", ("x",), ("y",), params, attrs)
    records = {"w": Param("w", weight.shape), **({"b": Param("b", bias.shape)} if bias is not None else {})}
    return Graph([op], {t: Tensor(t) for t in "xy"}, records, ["x"], ["y"])


@given(
    seed=st.integers(0, 10_000),
    signed=st.booleans(),
    bits=st.sampled_from([4, 8]),
    granularity=st.sampled_from([PerTensor(), PerChannel(0), Blockwise(0, 1, 4, 8)]),
    groups=st.sampled_from([1, 2]),
)
def test_the_accumulator_bound_is_attained(seed, signed, bits, granularity, groups):
    rng = np.random.default_rng(seed)
    conv = not isinstance(granularity, Blockwise)
    weight = rng.normal(size=(4, 4, 3, 3) if conv else (4, 8)).astype(np.float32)
    bits = 4 if isinstance(granularity, Blockwise) else bits
    grid = encoding_of_weights(weight, QuantSpec(bits, granularity=granularity))
    inputs = encoding_from_range(QuantSpec(8, signed=signed, symmetric=False), -rng.uniform(0, 2), rng.uniform(0.1, 3))
    attrs = ConvAttrs((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)), groups)
    graph = linear(weight, kind=OpKind.CONV, attrs=attrs) if conv else linear(weight)
    (row,) = accumulators(graph, {"w": grid, "x": inputs}, {"w": weight})
    codes = grid.quantize(weight).astype(np.int64)
    if grid.block_scale is not None:
        codes = codes * np.repeat(grid.block_scale, 4, axis=1)
    codes = codes.reshape(4, -1)
    low, high = inputs.grid.qmin - int(inputs.zero_point), inputs.grid.qmax - int(inputs.zero_point)
    assert row.high == max((c * np.where(c > 0, high, low)).sum() for c in codes)
    assert row.low == min((c * np.where(c > 0, low, high)).sum() for c in codes)
    assert row.inputs == codes.shape[1]
    assert row.bits <= row.any_weights
    for value in (int(row.high), int(row.low)):
        assert -(2 ** (row.bits - 1)) <= value < 2 ** (row.bits - 1)


def test_a_bias_takes_part_and_blocks_have_accumulators_of_their_own():
    weight, bias = np.ones((2, 8), np.float32), np.array([1000.0, -1000.0], np.float32)
    grid, inputs = (
        encoding_of_weights(weight, QuantSpec(8)),
        encoding_from_range(QuantSpec(8, signed=False, symmetric=False), 0, 1),
    )
    spec = QuantSpec(32, granularity=PerChannel(0))
    scale = np.full(2, float(grid.scale) * float(inputs.scale), np.float32)
    biases = encoding_from_range(spec, -np.ones(2), np.ones(2)).with_(scale=scale)
    table = {"w": grid, "x": inputs}
    plain, biased = (
        accumulators(linear(weight, bias), t, {"w": weight, "b": bias})[0] for t in (table, {**table, "b": biases})
    )
    codes = biases.quantize(bias)
    assert (plain.low, plain.high) == (0, 8 * 127 * 255)
    assert (biased.low, biased.high) == (codes[1], plain.high + codes[0])
    blocks = encoding_of_weights(weight, QuantSpec(4, granularity=Blockwise(0, 1, 2)))
    (row,) = accumulators(linear(weight), {**table, "w": blocks}, {"w": weight})
    assert (row.inputs, row.high) == (2, 2 * 7 * 255)


@pytest.mark.parametrize(
    ("value", "bits"), [(0, 1), (1, 2), (-1, 1), (127, 8), (128, 9), (-128, 8), (-129, 9), (2**31 - 1, 32), (2**31, 33)]
)
def test_widths(value, bits):
    assert width_of(value) == bits


def test_overflow_is_found():
    weight = np.ones((1, 70_000), np.float32)
    grid, inputs = (
        encoding_of_weights(weight, QuantSpec(8)),
        encoding_from_range(QuantSpec(8, signed=False, symmetric=False), 0, 1),
    )
    rows = accumulators(linear(weight), {"w": grid, "x": inputs}, {"w": weight})
    assert rows[0].int32 > 1 and overflowing(rows, 32) == rows and not overflowing(rows, 33)
    assert rows[0].int32 == pytest.approx(70_000 * 127 * 255 / (2**31 - 1))


def test_bounds_hold_for_what_an_integer_simulation_meets(images):
    sim = QuantSim(conv_model(), target="generic-int8").apply("fold_batch_norm").calibrate(images)
    integer = IntegerSimulation(sim.backend, sim.native, sim.graph, sim.table)
    integer.session([Tap("scores")]).run({"image": images})
    bounds = {r.op: r.int32 for r in accumulators(sim.graph, sim.table, sim.params)}
    assert set(integer.peaks) <= set(bounds) and integer.peaks
    for op, peak in integer.peaks.items():
        assert 0 < peak <= bounds[op] * (1 + 1e-9), op


def test_ranges_of_channels_and_equalization():
    weight = np.arange(1, 25, dtype=np.float32).reshape(4, 6) * np.array([[1], [-1], [1], [1]], np.float32)
    op = linear(weight).op("op")
    assert output_ranges(op, weight).tolist() == [6, 12, 18, 24]
    assert input_ranges(op, weight).tolist() == [19, 20, 21, 22, 23, 24]
    grouped = np.arange(1, 9, dtype=np.float32).reshape(4, 2, 1, 1)
    conv = linear(grouped, kind=OpKind.CONV, attrs=ConvAttrs((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), 2)).op("op")
    assert input_ranges(conv, grouped).tolist() == [3, 4, 7, 8]
    first, second = np.array([0.01, 1.0, 2.0, 0.0]), np.array([2.0, 1.0, 0.01, 3.0])
    one, two = equalized(first, second)
    assert one[:3] == pytest.approx(two[:3]) and (one[3], two[3]) == (0.0, 3.0)
    assert precision(one[:3], two[:3]) > precision(first[:3], second[:3])
    assert precision(np.ones(5), np.full(5, 7.0)) == 1


def test_imbalance_knows_depthwise_layers_and_followers(images):
    sim = QuantSim(conv_model(spread=0.01), target="per_tensor").apply("fold_batch_norm").calibrate(images)
    rows = {r.op: r for r in imbalances(sim.graph, sim.table, sim.params)}
    assert rows["dw"].depthwise and rows["dw"].ratio > 50 and not rows["dw"].per_channel
    per_channel = QuantSim(conv_model(), target="default").calibrate(images)
    assert all(
        r.per_channel for r in imbalances(per_channel.graph, per_channel.table, per_channel.params) if r.op != "fc"
    )


def test_histograms_count_everything_and_show_the_grid(images):
    sim = QuantSim(conv_model(), target="htp_v66").apply("fold_batch_norm").calibrate(images)
    table, data = dict(sim.table), sim.open(images)
    parameters = parameter_distributions(sim.graph, sim.plan, table, sim.params)
    activations = activation_distributions(sim.backend, sim.native, sim.graph, sim.plan, table, data, Silent())
    for d in parameters:
        values = sim.params[d.site]
        assert sum(d.counts) == values.size and (d.low, d.high) == (values.min(), values.max())
        assert len(d.channel_low) == values.shape[0]
        assert d.channel_low[1] == values[1].min()
    session = sim.backend.session(sim.native, [Tap(d.site) for d in activations])
    found = {tap.tensor: v for tap, v in session.run({"image": images}).items()}
    for d in activations:
        values = found[d.site]
        assert sum(d.counts) == pytest.approx(values.size, abs=len(d.counts))
        assert (d.low, d.high) == (values.min(), values.max())
        expected = np.histogram(values, len(d.counts), (d.first, d.first + d.width * len(d.counts)))[0]
        assert np.abs(np.cumsum(d.counts) - np.cumsum(expected)).max() <= 0.02 * values.size
        assert np.quantile(np.abs(values), 0.999) == pytest.approx(d.typical, rel=0.02)
        grid = table[d.site]
        assert d.grid_first == pytest.approx(float(grid.minimum)) and d.grid_codes == 256
        beyond = (values < grid.minimum - grid.scale / 2) | (values > grid.maximum + grid.scale / 2)
        assert d.clipped == pytest.approx(beyond.mean(), abs=0.003)


def test_weights_with_a_scale_a_channel_are_drawn_in_codes(images):
    sim = QuantSim(conv_model(), weights="int4").apply("fold_batch_norm").calibrate(images)
    (row,) = (
        d for d in parameter_distributions(sim.graph, sim.plan, dict(sim.table), sim.params) if d.site == "dw.weight"
    )
    assert row.unit == "code" and (row.grid_first, row.grid_step, row.grid_codes) == (-8, 1, 16)
    assert row.first >= -8.5 and row.first + row.width * len(row.counts) <= 7.5
    assert row.step_smallest < row.step_largest


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=200))
def test_shares_below_a_point_are_those_of_the_values(values):
    array = np.asarray(values, np.float32)
    statistic = HistogramStatistic()
    statistic.update(array.reshape(1, -1))
    at = np.linspace(-101, 101, 23)
    found = cumulative(statistic, at)
    assert (np.diff(found) >= 0).all() and found[0] == 0 and found[-1] == 1
    for point, share in zip(at, found, strict=True):
        width = abs(point) * 2**-8 + 1e-30
        assert (array < point - width).mean() - 1e-9 <= share <= (array <= point + width).mean() + 1e-9


@given(st.integers(0, 1000), st.integers(1, 6))
def test_errors_of_a_tensor_don_t_depend_on_batches(seed, size):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(12, 3, 4)).astype(np.float32)
    b = a + rng.normal(0.2, 0.1, size=a.shape).astype(np.float32)
    whole, parts = TensorError(1), TensorError(1)
    whole.add(a, b)
    for k in range(0, 12, size):
        parts.add(a[k : k + size], b[k : k + size])
    assert (whole.mse, whole.ratio, whole.shift, whole.largest) == (parts.mse, parts.ratio, parts.shift, parts.largest)
    error = b.astype(np.float64) - a
    assert whole.mse == pytest.approx(np.square(error).mean(), rel=1e-12)
    assert whole.shift == pytest.approx(np.square(error.mean((0, 2))).mean() / np.square(error).mean(), rel=1e-9)


def test_noise_on_nothing_is_all_noise():
    error = TensorError(None)
    error.add(np.zeros((2, 3)), np.ones((2, 3)))
    assert error.ratio == 1 and error.shift == 1
    assert TensorError(None).ratio == 0


def test_power_of_scalars_and_empty_batches():
    power = Power()
    power.add(np.float32(3.0))
    power.add(np.zeros((0, 4)))
    assert (power.total, power.count) == (9.0, 1)


def test_first_samples_cut_within_a_batch(trained):
    sim = QuantSim(trained.model)
    first = FirstSamples(sim.open(trained.x, batch_size=8), 21)
    assert [len(b["features"]) for b in first] == [8, 8, 5] and first.samples == 21
    assert first.fingerprint() != FirstSamples(sim.open(trained.x, batch_size=8), 20).fingerprint()


def test_tensors_are_packed_by_size():
    graph = Graph([], {n: Tensor(n, (None, 100)) for n in "abc"}, {}, ["a", "b", "c"], [])
    assert packed(graph, "abc", 1, budget=800) == [["a", "b"], ["c"]]
    assert packed(graph, "abc", 8, budget=800) == [["a"], ["b"], ["c"]]


def test_layers_are_the_ops_that_targets_fuse(images):
    sim = QuantSim(conv_model()).calibrate(images)
    assert layer_of(sim.graph, sim.plan, "image") is None
    found = {u.name: u for u in units(sim.graph, sim.plan) if u.kind == "layer"}
    assert set(found["conv"].roots) == {"conv.weight", "clip"}, "conv, batch norm and clip are one on this target"
    assert set(found["fc"].roots) == {"fc.weight", "scores"}
    assert found["add"].roots == ("sum",)
    assert onnx is not None
