"""The reference grid: ONNX arithmetic, ties, idempotence, layouts and float formats."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bitwright.errors import InputError
from bitwright.grids import (
    Blockwise,
    Grid,
    PerChannel,
    PerTensor,
    QuantSpec,
    cast_float,
    encoding_from_range,
    parse_type,
    scale_shape,
    spread,
    to_groups,
)
from bitwright.grids._grid import block_count, fake_quantize, quantize

ZERO = np.array(0, np.int32)
ONE = np.array(1, np.float32)

SPECS = [
    QuantSpec(bits, signed=signed, symmetric=symmetric, strict=strict)
    for bits in range(2, 17)
    for signed, symmetric, strict in [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
        (False, True, False),
    ]
]


@pytest.mark.parametrize(
    ("bits", "signed", "strict", "ends"),
    [
        (2, True, False, (-2, 1)),
        (2, False, False, (0, 3)),
        (8, True, False, (-128, 127)),
        (8, True, True, (-127, 127)),
        (8, False, False, (0, 255)),
        (16, False, False, (0, 65535)),
        (32, True, False, (-(2**31), 2**31 - 1)),
    ],
)
def test_code_ranges(bits, signed, strict, ends):
    grid = Grid.of(bits, signed=signed, strict=strict)
    assert (grid.qmin, grid.qmax) == ends
    assert grid.steps == ends[1] - ends[0]


def test_ties_round_to_even_before_the_zero_point_is_added():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)
    assert quantize(x, ONE, ZERO, Grid(-128, 127)).tolist() == [0, 2, 2, 0, -2, -2]
    # An odd zero point would turn the tie the other way if it were added first.
    assert quantize(x, ONE, np.array(3, np.int32), Grid(0, 255)).tolist() == [3, 5, 5, 3, 1, 1]


def test_it_divides_and_does_not_multiply_by_the_reciprocal():
    scale = np.float32(0.07)
    k = np.arange(-2000, 2000, dtype=np.float32)
    x = (k + np.float32(0.5)) * scale
    ours = quantize(x, np.array(scale), ZERO, Grid(-32768, 32767))
    assert np.array_equal(ours, np.rint(x / scale).astype(np.int32))
    assert not np.array_equal(ours, np.rint(x * (np.float32(1) / scale)).astype(np.int32))


@settings(max_examples=40, deadline=None)
@given(
    x=npst.arrays(np.float32, 64, elements=st.floats(-1e4, 1e4, width=32)),
    spec=st.sampled_from(SPECS),
)
def test_idempotent_within_codes_and_equal_to_its_two_steps(x, spec):
    encoding = encoding_from_range(spec, x.min(), x.max())
    codes = encoding.quantize(x)
    once = encoding.fake_quantize(x)
    assert codes.min() >= encoding.grid.qmin
    assert codes.max() <= encoding.grid.qmax
    assert np.array_equal(encoding.dequantize(codes), once)
    assert np.array_equal(encoding.fake_quantize(once), once)
    assert np.array_equal(encoding.quantize(once), codes)
    assert encoding.fake_quantize(np.zeros(1, np.float32))[0] == 0.0


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}{s.signed:d}{s.symmetric:d}{s.strict:d}")
def test_every_code_survives_a_round_trip(spec):
    encoding = encoding_from_range(spec, -1.3, 2.1)
    codes = np.arange(encoding.grid.qmin, encoding.grid.qmax + 1)
    assert np.array_equal(encoding.quantize(encoding.dequantize(codes)), codes)


def test_reduced_precision_inputs_keep_their_codes():
    encoding = encoding_from_range(QuantSpec(8), -4, 4)
    x = np.linspace(-5, 5, 999).astype(np.float16)
    assert np.array_equal(encoding.quantize(x), encoding.quantize(x.astype(np.float32)))


def test_32_bit_codes_are_exact():
    scale = np.array(2.0**-20, np.float32)
    codes = np.array([2**31 - 1, -(2**31), 2**24 + 1, 12345678])
    x = codes.astype(np.float64) * scale
    grid = Grid.of(32, signed=True)
    assert quantize(x, scale, ZERO, grid).tolist() == codes.tolist()
    assert quantize(np.array([1e9]), scale, ZERO, grid).tolist() == [2**31 - 1]
    assert fake_quantize(np.array([3.0]), scale, ZERO, grid)[0] == 3.0


def test_layouts():
    w = np.arange(2 * 6 * 3, dtype=np.float32).reshape(2, 6, 3)
    assert scale_shape(w.shape, PerTensor()) == ()
    assert scale_shape(w.shape, PerChannel(1)) == (6,)
    blocks = Blockwise(block_size=2)
    assert scale_shape(w.shape, blocks) == (2, 3)
    assert to_groups(w, PerChannel(-1)).shape == (3, 12)
    groups = to_groups(w, blocks)
    assert groups.shape == (2, 3, 6)
    assert sorted(groups[1, 2].tolist()) == sorted(w[1, 4:6].ravel().tolist())
    means = groups.mean(axis=-1)
    wide = spread(means, w.shape, blocks)
    assert np.broadcast_to(wide, w.shape)[1, 5, 0] == means[1, 2]
    swapped = Blockwise(axis=1, block_axis=0, block_size=1)
    assert np.array_equal(
        np.broadcast_to(spread(to_groups(w, swapped).mean(axis=-1), w.shape, swapped), w.shape)[..., 0], w.mean(axis=-1)
    )


def test_blocks_must_divide_the_axis():
    with pytest.raises(InputError, match=r"block size 4 doesn't divide axis 1 .*choose a divisor of 6"):
        block_count((2, 6), Blockwise(block_size=4))


def test_axis_and_scale_shape_errors_name_the_numbers():
    with pytest.raises(InputError, match="axis 3 is out of range"):
        scale_shape((2, 3), PerChannel(3))
    with pytest.raises(InputError, match=r"shape \(3,\) for 2 channels"):
        spread(np.ones(3, np.float32), (2, 3), PerChannel(0))


@pytest.mark.parametrize(
    "changes", [{"bits": 1}, {"bits": 17}, {"float_format": "float9"}, {"symmetric": False, "strict": True}]
)
def test_impossible_specifications_are_refused(changes):
    with pytest.raises(InputError):
        QuantSpec(**changes)


def test_types_as_users_write_them():
    assert parse_type("int8") == (8, True, None, None)
    assert parse_type("UINT16") == (16, False, None, None)
    assert parse_type("fp8") == (8, None, "float8e4m3fn", None)
    assert parse_type("int4:block32")[3] == Blockwise(block_size=32)
    assert parse_type("int4:lpbq64")[3] == Blockwise(block_size=64, decompressed_bits=8)
    for wrong in ("int1", "int17", "float", "int4:block0", "fp8:block32", "int8:lpbq32", "int4:group8"):
        with pytest.raises(InputError):
            parse_type(wrong)


X = np.array([0.1, 1.3, 3.14159, 500, 70000, 1e-8])


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("float8e4m3fn", [0.1015625, 1.25, 3.25, 448, 448, 0]),
        ("float8e5m2", [0.09375, 1.25, 3, 512, 57344, 0]),
        ("float16", [0.0999755859375, 1.2998046875, 3.140625, 500, 65504, 0]),
    ],
)
def test_float_formats(format, expected):
    assert cast_float(X, format).tolist() == expected


def test_bfloat16_keeps_tiny_values():
    found = cast_float(X, "bfloat16")
    assert found[4] == 70144
    assert found[5] == pytest.approx(1.0012e-8, rel=1e-4)


@pytest.mark.parametrize("format", ["float8e4m3fn", "float8e5m2", "bfloat16", "float16"])
def test_float_formats_agree_with_ml_dtypes(format):
    kinds = pytest.importorskip("ml_dtypes")
    kind = (
        np.float16
        if format == "float16"
        else getattr(kinds, {"float8e4m3fn": "float8_e4m3fn", "float8e5m2": "float8_e5m2"}.get(format, format))
    )
    rng = np.random.default_rng(0)
    x = (rng.normal(size=20000) * np.exp2(rng.integers(-20, 8, 20000))).astype(np.float32)
    x = np.clip(x, -448, 448)
    expected = x.astype(kind).astype(np.float32)
    assert np.array_equal(cast_float(x, format), expected)
    assert np.array_equal(cast_float(expected, format), expected)


def test_fp8_scale_moves_the_range():
    assert cast_float(np.array([448.0 * 4]), "float8e4m3fn", 4.0).tolist() == [1792.0]
