"""Ranges to encodings: the exact vectors of AIMET 2.42, two-level scales, the immutable table."""

import numpy as np
import pytest

from bitwright.errors import EncodingError
from bitwright.grids import (
    Blockwise,
    Encoding,
    EncodingTable,
    PerChannel,
    PerTensor,
    Provenance,
    QuantSpec,
    encoding_from_range,
    encoding_of_weights,
    two_level,
)

X = np.array([-1, -0.5, 0, 0.3, 2], np.float32)
UINT8 = QuantSpec(8, signed=False, symmetric=False)
INT8 = QuantSpec(8)


def encode(spec, values):
    values = np.asarray(values, np.float32)
    return encoding_from_range(spec, values.min(), values.max())


def test_asymmetric_8_bits():
    e = encode(UINT8, X)
    assert e.scale == pytest.approx(0.0117647061, rel=1e-6)
    assert e.zero_point == 85
    assert e.quantize(X).tolist() == [0, 43, 85, 111, 255]
    assert e.fake_quantize(X) == pytest.approx([-1, -0.49411765, 0, 0.30588236, 2], rel=1e-6)
    assert (e.minimum, e.maximum) == (pytest.approx(-1), pytest.approx(2))


def test_symmetric_8_bits():
    e = encode(INT8, X)
    assert e.scale == pytest.approx(0.01574803, rel=1e-6)
    assert e.zero_point == 0
    assert e.quantize(X).tolist() == [-64, -32, 0, 19, 127]
    assert e.minimum == pytest.approx(-2.015748, rel=1e-6)
    assert e.maximum == pytest.approx(2)


def test_other_widths_and_strict():
    e = encode(QuantSpec(4, signed=False, symmetric=False), X)
    assert (float(e.scale), int(e.zero_point)) == (pytest.approx(0.2), 5)
    e = encode(QuantSpec(4), X)
    assert e.scale == pytest.approx(0.2857143, rel=1e-6)
    assert e.minimum == pytest.approx(-2.285714, rel=1e-6)
    e = encode(QuantSpec(8, strict=True), X)
    assert e.scale == pytest.approx(2 / 127)
    assert (e.minimum, e.maximum) == (pytest.approx(-2), pytest.approx(2))
    wide = np.arange(-2, 10)
    assert encode(QuantSpec(3), wide).scale == 3
    assert (encode(QuantSpec(3), wide).minimum, encode(QuantSpec(3), wide).maximum) == (-12, 9)
    strict = encode(QuantSpec(3, strict=True), wide)
    assert (strict.minimum, strict.maximum) == (-9, 9)


@pytest.mark.parametrize(
    ("values", "scale", "zero", "low", "high"),
    [
        ([1, 2, 3], 0.0117647, 0, 0, 3),
        ([-1, -2, -3], 0.0117647, 255, -3, 0),
        ([-40, 80], 0.4705882370, 85, -40, 80),
        ([10, 10], 0.0392156877, 0, 0, 10),
        ([1000, 1200], 4.7058825, 0, 0, 1200),
        ([-8, -5], 0.0313725509, 255, -8, 0),
    ],
)
def test_zero_is_always_included(values, scale, zero, low, high):
    e = encode(UINT8, values)
    assert e.scale == pytest.approx(scale, rel=1e-6)
    assert e.zero_point == zero
    assert (e.minimum, e.maximum) == (pytest.approx(low), pytest.approx(high))


def test_signed_storage_of_an_asymmetric_grid_is_the_same_grid():
    unsigned, signed = encode(UINT8, X), encode(QuantSpec(8, signed=True, symmetric=False), X)
    assert unsigned.scale == signed.scale
    assert signed.zero_point == unsigned.zero_point - 128
    assert np.array_equal(signed.fake_quantize(X), unsigned.fake_quantize(X))


def test_constant_tensors():
    e = encode(UINT8, [10, 10])
    assert e.fake_quantize(np.full(3, 10, np.float32)).tolist() == [10, 10, 10]
    for spec in (UINT8, INT8, QuantSpec(16), QuantSpec(4)):
        e = encode(spec, np.zeros(3))
        assert np.isfinite(e.scale)
        assert e.scale > 0
        assert e.fake_quantize(np.zeros(3, np.float32)).tolist() == [0, 0, 0]
    assert encode(UINT8, [0]).scale == pytest.approx(1.1920929e-7)
    assert encode(UINT8, [0]).maximum == pytest.approx(3.04e-5, rel=1e-2)
    assert encode(INT8, [0]).maximum == pytest.approx(1.5e-5, rel=2e-2)


def test_a_negative_extreme_gets_the_extra_code():
    e = encode(INT8, [-3, -1])
    assert e.scale == 3 / 128
    assert (e.minimum, e.maximum) == (-3, pytest.approx(2.9766, rel=1e-4))


def test_unsigned_symmetric_uses_all_codes_for_positive_data():
    spec = QuantSpec(8, unsigned_symmetric=True)
    e = encode(spec, [0, 3])
    assert (e.signed, int(e.zero_point)) == (False, 0)
    assert (e.minimum, e.maximum) == (0, pytest.approx(3))
    assert encode(spec, [-0.1, 3]).signed
    stored = encode(QuantSpec(8, signed=False, symmetric=True), [-2, 2])
    assert stored.zero_point == 128


def test_constraints():
    pinned = UINT8.with_(minimum=0.0, maximum=1.0)
    for values in ([-0.2, 7], [0.1, 0.5]):
        e = encode(pinned, values)
        assert (e.minimum, e.maximum) == (0, pytest.approx(1))
    e = encode(UINT8.with_(minimum=0.0), [-0.2, 0.5])
    assert (e.minimum, e.maximum) == (0, pytest.approx(0.5))
    e = encode(UINT8.with_(maximum=2.0), [-1, 7])
    assert (e.minimum, e.maximum) == (pytest.approx(-1), pytest.approx(2))


def test_numbers_can_t_be_written_to_and_are_nobody_else_s():
    scale, zero = np.float32([1, 2]), np.int32([0, 1])
    e = Encoding(8, True, True, scale, zero, PerChannel(0))
    scale[0], zero[0] = 3, 4
    assert e.scale.tolist() == [1, 2] and e.zero_point.tolist() == [0, 1]
    for numbers in (e.scale, e.zero_point):
        with pytest.raises(ValueError, match="read-only"):
            numbers[0] = 1


def test_bad_ranges_are_refused():
    with pytest.raises(EncodingError, match="NaN or infinite"):
        encoding_from_range(INT8, 0.0, np.inf)
    with pytest.raises(EncodingError, match="low end exceeds"):
        encoding_from_range(INT8, 1.0, -1.0)
    with pytest.raises(EncodingError, match="greater than 0"):
        Encoding(8, True, True, np.float32(0), np.int32(0))
    with pytest.raises(EncodingError, match="rank 1"):
        Encoding(8, True, True, np.float32(1), np.int32(0), PerChannel(0))
    with pytest.raises(EncodingError, match=r"outside the codes -128\.\.127"):
        Encoding(8, True, True, np.float32(1), np.int32(128))
    for zero in ([0, 128], [-129, 0]):
        with pytest.raises(EncodingError, match=r"outside the codes -128\.\.127"):
            Encoding(8, True, True, np.float32([1, 1]), np.int32(zero), PerChannel(0))
    with pytest.raises(EncodingError, match="no integer codes"):
        encoding_from_range(QuantSpec(16, float_format="float16"), -1, 1).quantize(X)


W = np.array([[1, -2, 3, -4, 0.5, 0.25, -0.125, 0.06], [7, -7, 1, 1, 2, 2, -3, -1]], np.float32)


def test_blockwise_example():
    e = encoding_of_weights(W, QuantSpec(4, granularity=Blockwise(block_size=2)))
    expected = [[0.25, 0.5, 0.0714286, 0.015625], [1, 0.1428571, 0.2857143, 0.375]]
    assert e.scale == pytest.approx(np.array(expected), rel=1e-5)


def test_low_power_blockwise_example():
    layout = Blockwise(block_size=2, decompressed_bits=8)
    e = encoding_of_weights(W, QuantSpec(4, granularity=layout))
    assert e.block_scale.tolist() == [[8, 16, 2, 1], [16, 2, 5, 6]]
    assert e.scale.tolist() == [[0.25, 0.5, 0.0625, 0.03125], [1, 0.125, 0.3125, 0.375]]
    rounded = e.fake_quantize(W)
    assert rounded[0].tolist() == [1, -2, 3, -4, 0.4375, 0.25, -0.125, 0.0625]
    assert rounded[1].tolist() == [7, -7, 0.875, 0.875, 1.875, 1.875, -3, -1.125]
    gamma = e.scale[:, :1] / e.block_scale[:, :1]
    codes8 = e.quantize(W) * np.repeat(e.block_scale, 2, axis=1)
    assert np.abs(codes8).max() <= 128
    assert np.array_equal(codes8 * gamma, rounded)
    assert two_level(e).equals(e)


def test_one_block_a_channel_is_per_channel():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(5, 12)).astype(np.float32)
    blocks = encoding_of_weights(w, QuantSpec(4, granularity=Blockwise(block_size=12)))
    channels = encoding_of_weights(w, QuantSpec(4, granularity=PerChannel(0)))
    assert np.array_equal(blocks.scale[:, 0], channels.scale)
    assert np.array_equal(blocks.fake_quantize(w), channels.fake_quantize(w))
    lpbq = encoding_of_weights(w, QuantSpec(4, granularity=Blockwise(block_size=4, decompressed_bits=8)))
    assert lpbq.scale.max(axis=1) == pytest.approx(channels.scale)


def test_all_zero_channels_get_a_usable_scale():
    w = np.stack([np.zeros(9), np.full(9, 1e-9), np.ones(9)]).astype(np.float32)
    e = encoding_of_weights(w, QuantSpec(8, granularity=PerChannel(0)))
    assert np.isfinite(e.fake_quantize(w)).all()
    assert (e.fake_quantize(w)[:2] == 0).all()


def test_tables_are_immutable_and_keep_provenance():
    e = encode(INT8, X)
    table = EncodingTable({"a": e}).recorded(Provenance("adaround", {"iterations": 10}))
    more = table.merged({"b": e.with_(frozen=True)})
    assert list(table) == ["a"]
    assert list(more.frozen) == ["b"]
    assert repr(table.merged({s: e.with_(frozen=s != "c") for s in "bcd"})) == "EncodingTable(4 encodings, 2 frozen)"
    assert more.provenance[0].technique == "adaround"
    assert list(more.restricted({"a"})) == ["a"]
    with pytest.raises(ValueError, match="read-only"):
        e.scale[...] = 1
    assert e.equals(e.with_(source="other", frozen=True))
    assert not e.equals(e.with_(scale=np.float32(2)))
    assert e.granularity == PerTensor()


def test_steps_between_tensors():
    e = encoding_from_range(QuantSpec(8, signed=False, symmetric=False), -1, 2)
    a = np.array([[-1, -0.5, 0], [0.3, 2, 9]], np.float32)
    b = np.array([[-1, 0.5, 0.001], [0.3, 1, 11]], np.float32)
    expected = np.abs(e.quantize(a).astype(int) - e.quantize(b))
    found = e.steps_between(a, b)
    assert found.tolist() == [84, 0, 85, 0]  # of the four values that differ
    assert found.sum() == expected.sum() and found.max() == expected.max()
    w = np.array([[1, 2], [3, 4]], np.float32)
    channels = encoding_of_weights(w, QuantSpec(8, granularity=PerChannel(0)))
    turned = np.abs(channels.quantize(w) - channels.quantize(w[:, ::-1]))
    assert channels.steps_between(w, w[:, ::-1]).tolist() == turned.reshape(-1).tolist()


def test_steps_between_counts_codes():
    """On one grid only values that differ are looked at; with a scale for each channel all are."""
    a, b = np.array([[0.0, 1.0], [2.0, -1.0]], np.float32), np.array([[0.0, 1.5], [2.0, 3.0]], np.float32)
    one = Encoding(8, True, True, np.float32(0.5), np.int32(0))
    assert one.steps_between(a, b).tolist() == [1, 8]
    channels = Encoding(8, True, True, np.array([0.5, 1.0], np.float32), np.zeros(2, np.int32), PerChannel(0))
    assert channels.steps_between(a, b).tolist() == [0, 1, 0, 4]
