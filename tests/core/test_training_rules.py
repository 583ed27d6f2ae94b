"""Which grids follow and learn in training, and the numbers that they get, in numpy."""

import numpy as np
import pytest

from bitwright.grids import (
    Blockwise,
    GridPolicy,
    Groups,
    PerChannel,
    QuantSpec,
    encoding_from_range,
    encoding_of_weights,
    followed,
    learned_scale,
    learned_zero,
    min_max_numbers,
    present,
    ratio_to,
    two_level_scales,
)
from bitwright.grids._range_numbers import NumpyRanges

UINT8 = QuantSpec(8, signed=False, symmetric=False)
LPBQ = QuantSpec(4, granularity=Blockwise(0, 1, 4, 8))
SPECS = {
    "uint8": UINT8,
    "int8": QuantSpec(8),
    "int8 strict": QuantSpec(8, strict=True),
    "uint8 symmetric": QuantSpec(8, signed=False),
    "uint16 channels": QuantSpec(16, signed=False, symmetric=False, granularity=PerChannel(1)),
    "int4 blocks": QuantSpec(4, granularity=Blockwise(0, 1, 4)),
    "int4 blocks before channels": QuantSpec(4, granularity=Blockwise(1, 0, 2)),
    "lpbq": LPBQ,
    "float16": QuantSpec(16, float_format="float16"),
    "e4m3": QuantSpec(8, float_format="float8e4m3fn"),
}


class Numpy(NumpyRanges):
    exp = staticmethod(np.exp)
    stop = staticmethod(lambda x: x)


NS = Numpy()
MOVING, AT_END = encoding_from_range(UINT8, -1.0, 2.0), encoding_from_range(UINT8, 0.0, 2.0)
SIGNED = encoding_from_range(QuantSpec(8), -1.0, 2.0)
HALF = encoding_from_range(QuantSpec(16, float_format="float16"), -1.0, 2.0)
FP8 = encoding_from_range(QuantSpec(8, float_format="float8e4m3fn"), -1.0, 2.0)


@pytest.mark.parametrize(
    ("encoding", "options", "learning", "regular"),
    [
        (MOVING, {"parameter": False}, (True, True, False), (False, False, False)),
        (MOVING, {"parameter": True}, (True, True, False), (False, False, True)),
        (AT_END, {"parameter": False}, (True, False, False), (False, False, False)),
        (SIGNED, {"parameter": True}, (True, False, False), (False, False, True)),
        (FP8, {"parameter": True}, (True, False, False), (False, False, True)),
        (HALF, {"parameter": True}, (False, False, False), (False, False, False)),
        (MOVING.with_(frozen=True), {"parameter": True}, (False, False, False), (False, False, False)),
        (MOVING, {"parameter": True, "derived": True}, (False, False, False), (False, False, False)),
        (None, {"parameter": True}, (False, False, False), (False, False, False)),
    ],
)
def test_which_grids_learn_and_follow(encoding, options, learning, regular):
    assert GridPolicy.of(encoding, range_learning=True, **options) == GridPolicy(*learning)
    assert GridPolicy.of(encoding, range_learning=False, **options) == GridPolicy(*regular)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_min_max_grids_are_calibration_s(spec):
    weight = (np.random.default_rng(0).normal(size=(6, 8, 3)) * 3).astype(np.float32)
    weight[0] = 0
    for values in (weight, np.abs(weight)):
        expected = encoding_of_weights(values, spec)
        groups = Groups.of(values.shape, spec.granularity)
        scale, zero = min_max_numbers(NS, groups.cut(NS, values), expected, groups)
        assert scale.dtype == np.float32
        assert np.array_equal(two_level_scales(NS, scale, expected), expected.scale)
        assert np.array_equal(zero, expected.zero_point)


def test_min_max_grids_in_numbers():
    weight = np.float32([[-1.28, 0.5], [0.0, 2.54]])
    groups = Groups.of((2, 2), PerChannel(0))
    spec = QuantSpec(8, granularity=PerChannel(0))
    scale, zero = min_max_numbers(NS, weight, encoding_of_weights(weight, spec), groups)
    assert np.array_equal(scale, np.float32([0.01, 0.02]))  # 1.28/128 and 2.54/127
    assert np.array_equal(zero, [0, 0])
    form = encoding_of_weights(weight, UINT8)
    scale, zero = min_max_numbers(NS, weight, form, Groups.of((2, 2), UINT8.granularity))
    assert np.float32(scale) == np.float32((np.float64(np.float32(2.54)) + np.float64(np.float32(1.28))) / 255)
    assert zero == 85  # 1.28/(3.82/255) = 85.4


def test_a_grid_that_follows_keeps_its_ratio():
    base, zero = np.float32([0.5, 0.5]), np.float64([3, 3])
    ratio = ratio_to(NS, np.float32([0.5, 0.4]), base)
    scale, found = followed(NS, 2 * base, zero, ratio, np.float64([7, 7]), MOVING)
    assert np.array_equal(scale, np.float32([1.0, 0.8]))
    assert np.array_equal(found, [3, 7])  # min-max's own where the grid is min-max's, else the one that was chosen


def test_learned_zero_points_are_whole_and_within_the_codes():
    zero = np.float32([0, 100, 100, 255])
    found = learned_zero(NS, zero, np.float32([0.1, 0.01, 9.0, -0.1]), 0.0, 255.0)
    assert np.array_equal(found, [0, 103, 255, 255])  # ends stay


def test_learned_scales_of_two_levels_stay_two_level():
    form = encoding_of_weights(np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32), LPBQ)
    shift = np.random.default_rng(2).normal(size=form.scale.shape).astype(np.float32)
    found = learned_scale(NS, form.scale, shift, form)
    assert np.array_equal(found, two_level_scales(NS, form.scale * np.exp(shift), form))
    factors = found / (found.max(axis=1, keepdims=True) / 16)
    assert np.allclose(factors, np.rint(factors), atol=1e-5)
    assert np.array_equal(learned_scale(NS, MOVING.scale, np.float32(0), MOVING), MOVING.scale)


def test_what_was_learned_is_frozen_and_what_wasn_t_is_as_it_was():
    assert present(MOVING, MOVING.scale, MOVING.zero_point, True) is MOVING
    learned = present(MOVING, MOVING.scale * 2, MOVING.zero_point, True)
    assert learned.frozen
    assert learned.source == "range learning"
    followed = present(MOVING, MOVING.scale, MOVING.zero_point + 0.75, False)
    assert not followed.frozen
    assert followed.zero_point == MOVING.zero_point + 1
