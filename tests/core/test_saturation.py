"""Sums of neighbours in int16: the order of products, the proof, scales that keep the limit, and the kernel itself."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.bundle import _saturation as saturation
from bitwright.graph import ConvAttrs, Op, OpKind, ParamRole
from bitwright.grids import (
    Encoding,
    PerChannel,
    PerTensor,
    QuantSpec,
    encoding_of_weights,
    in_order,
    pair_limit,
    pair_sums,
)
from bitwright.grids._pair_sums import fitted_scale
from bitwright.verify._integer_kernels import accumulate, matmul

INPUTS = Encoding(8, False, False, np.float32(1), np.int32(3), PerTensor())


def conv(groups=1, kernel=(3, 3)):
    attrs = ConvAttrs(kernel, (1, 1), (1, 1), ((1, 1), (0, 1)), groups)
    return Op("c", OpKind.CONV, "Conv", ("x",), ("y",), {ParamRole.WEIGHT: "w"}, attrs)


LINEAR = Op("l", OpKind.LINEAR, "MatMul", ("x",), ("y",), {ParamRole.WEIGHT: "w"})


def test_order_is_positions_outside_and_channels_inside():
    weight = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    # Output 0: channels 0, 1, 2 start at 0, 4, 8; positions follow each other.
    assert in_order(weight)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert in_order(np.array([[5, 6, 7]])).tolist() == [[5, 6, 7]]


def test_pair_sums_by_hand():
    high, low = pair_sums(np.array([[100, 50, -100, 20, -60, -70, 90]]))
    assert high.tolist() == [[150, 20, 0, 90]]  # the odd one out stands alone
    assert low.tolist() == [[0, -100, -130, 0]]


@pytest.mark.parametrize(("bits", "limit"), [(8, 128), (7, 258), (4, 2184)])
def test_limit(bits, limit):
    assert pair_limit(bits) == limit
    assert limit * (2**bits - 1) <= 32767 < (limit + 1) * (2**bits - 1)


def test_the_kernel_loses_what_a_cpu_loses():
    """255 and 127, eight times: 131,068 on AVX2 (ONNX Runtime 1.32 on an emulated Haswell), 259,080 exactly."""
    inputs = INPUTS.with_(zero_point=np.int32(0))
    codes, weight = np.full((3, 8), 255), np.full((5, 8), 127, np.int8)
    found, lost = saturation.accumulate(LINEAR, codes, inputs, weight, None)
    assert (found == 131068).all()
    assert lost == 3 * 5 * 4
    assert (accumulate(LINEAR, codes, inputs, weight, None) == 259080).all()
    lowest, _ = saturation.accumulate(LINEAR, codes, inputs, -weight, None)
    assert (lowest == 4 * -32768).all()


@pytest.mark.parametrize("seed", range(6))
def test_bound_is_what_the_worst_inputs_reach(seed):
    """No inputs give more than the bound, some give it, and only channels that it names lose anything."""
    weight = np.random.default_rng(seed).integers(-110, 111, (4, 5)).astype(np.int8)
    found = saturation.bound(weight)
    corners = np.array(list(product((0, 255), repeat=5)))
    twos = [(0, 1), (2, 3), (4,)]
    reached = np.stack([[corners[:, two] @ w[list(two)] for two in twos] for w in weight.astype(int)]).reshape(4, -1)
    assert found.highest.tolist() == reached.max(axis=1).tolist()
    assert found.lowest.tolist() == reached.min(axis=1).tolist()
    wrong, _ = saturation.accumulate(LINEAR, corners, INPUTS, weight, None)
    right = accumulate(LINEAR, corners, INPUTS, weight.astype(np.int32), None)
    assert ((right != wrong.T).any(axis=0) == found.channels).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_safe_convolution_is_exact_and_an_unsafe_one_isnt(groups):
    rng = np.random.default_rng(0)
    op, shape = conv(groups), (6, 4 // groups, 3, 3)
    codes = rng.integers(200, 256, (2, 4, 6, 5))
    for weight, safe in ((rng.integers(-64, 65, shape), True), (rng.integers(90, 128, shape), False)):
        assert saturation.bound(weight).channels.any() != safe
        right = accumulate(op, codes, INPUTS, weight.astype(np.int32), 1)
        found, lost = saturation.accumulate(op, codes, INPUTS, weight, 1)
        found = np.moveaxis(found.reshape(6, 2, *right.shape[2:]), 0, 1)
        assert np.array_equal(found, right) == safe
        assert (lost == 0) == safe


def test_products_of_a_sequence_convolution_are_added_in_the_kernels_order():
    """Positions outside, channels inside: each sum by hand, in the order of `in_order`."""
    attrs = ConvAttrs((3,), (1,), (1,), ((0, 0),), 1)
    op = Op("c", OpKind.CONV, "Conv", ("x",), ("y",), {ParamRole.WEIGHT: "w"}, attrs)
    rng = np.random.default_rng(0)
    inputs = INPUTS.with_(zero_point=np.int32(0))
    codes, weight = rng.integers(180, 256, (2, 3, 5)), rng.integers(40, 128, (2, 3, 3)).astype(np.int8)
    found, lost = saturation.accumulate(op, codes, inputs, weight, 1)
    expected, over = np.zeros((2, 2, 3), int), 0
    for n, o, t in product(range(2), range(2), range(3)):
        products = [int(weight[o, c, k]) * int(codes[n, c, t + k]) for k in range(3) for c in range(3)] + [0]
        sums = [a + b for a, b in zip(products[::2], products[1::2], strict=True)]
        expected[o, n, t] = sum(min(s, 32767) for s in sums)
        over += sum(s > 32767 for s in sums)
    assert found.tolist() == expected.reshape(2, -1).tolist()
    assert lost == over > 0


def test_two_lowest_codes_are_named():
    """ARM adds two products of int8 in int16: (−128)·(−128) twice doesn't fit, wherever they lie."""
    weight = np.zeros((2, 16), np.int8)
    weight[0, [0, 9]] = -128
    weight[1, 3] = -128
    assert saturation.bound(weight).channels.tolist() == [True, False]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24), st.sampled_from([1.0, 0.3, 3.0]), st.floats(1, 2))
def test_fitted_scales_hold_for_every_rounding(seed, length, spread, larger):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(spread * 3, (4, length)) * rng.uniform(1e-6, 10)).astype(np.float32)
    weight[0] = np.abs(weight[0])
    base = encoding_of_weights(weight, QuantSpec(8, granularity=PerChannel(0)))
    scale = fitted_scale(weight, base.scale, 8, 128)
    ratio = scale / base.scale
    assert (ratio >= 1).all()
    assert (ratio < 2.04).all()
    for s in (scale, (scale * np.float32(larger)).astype(np.float32)):
        units = weight / s[:, None]
        low, high = np.floor(units), np.ceil(units)
        for codes in (low, high, np.rint(units), np.where(rng.random(units.shape) < 0.5, low, high)):
            assert not saturation.bound(np.clip(codes, -128, 127).astype(np.int8)).channels.any()


def test_only_channels_that_need_it_are_raised():
    weight = np.array([[1, 0.001, 0.5, -0.5], [1, 0.9, 0.1, 0.2], [0, 0, 0, 0]], np.float32)
    spec = QuantSpec(8, granularity=PerChannel(0))
    plain, limited = (encoding_of_weights(weight, s) for s in (spec, spec.with_(pair_limit=128)))
    assert limited.scale[[0, 2]].tolist() == plain.scale[[0, 2]].tolist()
    assert 1.8 < limited.scale[1] / plain.scale[1] < 1.93  # 127 + 114.3 becomes 128, with a code each to spare
    assert saturation.bound(plain.quantize(weight)).channels.tolist() == [False, True, False]
    assert not saturation.bound(limited.quantize(weight)).channels.any()


@pytest.mark.parametrize("zero", [-128, 0, 127])
def test_accumulators_are_exact_beyond_what_float32_counts(zero):
    """2,001 products of which the sum is odd and above 2**24, wherever the zero point lies."""
    inputs = Encoding(8, True, False, np.float32(1), np.int32(zero), PerTensor())
    code = 127 if zero < 127 else -128
    codes, weight = np.full((1, 2001), code), np.full((1, 2001), 127, np.int8)
    if zero == 0:
        weight = weight - np.arange(2001) % 2 * 2
    exact = int(((codes - zero) * weight.astype(int)).sum())
    assert abs(exact) > 2**24 and exact % 2
    assert accumulate(LINEAR, codes, inputs, weight, None).tolist() == [[exact]]
    other = Encoding(8, False, False, np.float32(1), np.int32(0), PerTensor())
    right = np.abs(weight.astype(np.int32)).T
    assert matmul(codes.astype(np.int32), inputs, right, other).tolist() == [[exact]]
    assert matmul(right.T, other, codes.astype(np.int32).T, inputs).tolist() == [[exact]]


def test_a_pair_sum_at_the_edge_of_int16_holds():
    """32,767 and −32,768 are int16 numbers; one more or one less isn't, and two codes of −128 wrap around on ARM."""
    edge = saturation.Bound(np.array([32767, 32768, 0, 0]), np.array([-32768, 0, -32769, 0]), np.array([1, 1, 1, 2]))
    assert edge.channels.tolist() == [False, True, True, True]
