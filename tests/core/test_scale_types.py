"""Scales in the number type that a file keeps them in."""

import numpy as np
import pytest

from bitwright.errors import TargetError
from bitwright.grids import (
    Blockwise,
    Encoding,
    PerChannel,
    QuantSpec,
    encoding_arrays,
    encoding_of_arrays,
    encoding_of_weights,
    typed_scale,
)
from bitwright.targets import load_target

SCALES = np.concatenate([np.geomspace(1e-9, 1e5, 4001), [6e-8, 65504.0, 65520.0, 2.0**-14]]).astype(np.float32)


def test_float16_is_numpys():
    with np.errstate(over="ignore"):
        expected = np.clip(SCALES.astype(np.float16).astype(np.float32), 2.0**-24, 65504)
    assert np.array_equal(typed_scale(SCALES, "float16", 4), expected)


def test_bfloat16_has_eight_bits():
    found = typed_scale(SCALES, "bfloat16", 4)
    assert not (found.view(np.uint32) & 0xFFFF).any()
    assert (np.abs(found / SCALES - 1) <= 2.0**-8).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_minimum_is_a_float16_number_too(bits):
    found = typed_scale(SCALES, "float16+minimum", bits)
    assert np.array_equal(found.astype(np.float16).astype(np.float32), found)
    for zero in range(2**bits):
        minimum = found * np.float32(zero)
        with np.errstate(over="raise"):
            assert np.array_equal(minimum.astype(np.float16).astype(np.float32), minimum)
    largest = 65504 / 2**bits
    inside = (SCALES > 2.0**-10) & (largest > SCALES)
    assert (np.abs(found / SCALES - 1)[inside] <= 2.0 ** (bits - 11)).all()


def test_encodings_keep_the_type_whoever_sets_the_scale():
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    spec = QuantSpec(4, granularity=Blockwise(block_size=32), scale_type="float16")
    made = encoding_of_weights(weight, spec)
    plain = encoding_of_weights(weight, spec.with_(scale_type=None))
    assert np.array_equal(made.scale, plain.scale.astype(np.float16).astype(np.float32))
    assert not np.array_equal(made.scale, plain.scale)
    moved = made.with_(scale=plain.scale * np.float32(0.9))
    assert np.array_equal(moved.scale, moved.scale.astype(np.float16).astype(np.float32))
    again = encoding_of_arrays(encoding_arrays(moved))
    assert again.equals(moved) and again.scale_type == "float16"


def test_specifications_without_a_type_read_as_before():
    assert "scale_type" not in repr(QuantSpec(4))  # runs store their results under it
    assert repr(QuantSpec(4, granularity=PerChannel(0))) == (
        "QuantSpec(bits=4, signed=True, symmetric=True, strict=False, unsigned_symmetric=False, "
        "granularity=PerChannel(axis=0), float_format=None, minimum=None, maximum=None, scheme=None, pair_limit=None)"
    )
    assert repr(QuantSpec(4, scale_type="float16")).endswith("pair_limit=None, scale_type='float16')")


def test_two_level_scales_are_as_they_are():
    factors = np.array([[1, 3]], np.int32)
    scale = (factors * 0.1).astype(np.float32)
    made = Encoding(
        4, True, True, scale, np.zeros((1, 2), np.int32), Blockwise(decompressed_bits=8), block_scale=factors,
        scale_type="float16",
    )  # fmt: skip
    assert np.array_equal(made.scale, scale)


def test_scales_that_are_raised_arent_rounded():
    with pytest.raises(TargetError, match="leave one of them out"):
        load_target({"bitwright": {"extends": "onnxruntime-cpu", "weight_scales": "float16"}})
