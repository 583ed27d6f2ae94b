"""Blocks of floats: tables of values, and scales that are powers of two or float8 numbers."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.errors import InputError
from bitwright.grids import (
    CODE_TABLES,
    NUMPY,
    Blockwise,
    Encoding,
    GridPolicy,
    QuantSpec,
    block_scales,
    cast_float,
    encoding_arrays,
    encoding_from_range,
    encoding_of_arrays,
    encoding_of_weights,
    parse_type,
    typed_scale,
)
from bitwright.placement import build_plan
from bitwright.report import describe
from bitwright.targets import load_target
from bitwright.testing.builder import Builder

TYPES = ["mxfp4", "mxfp8", "mxfp8_e5m2", "nvfp4", "nf4"]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NORMAL = np.random.default_rng(0).standard_normal(20000).astype(np.float32)


def spec_of(name: str, size: int | None = None) -> QuantSpec:
    bits, _, format, layout = parse_type(name)
    layout = layout if size is None else Blockwise(block_size=size)
    return QuantSpec(bits, granularity=layout, float_format=format, scale_type=block_scales(name))


def made(name: str, weight: np.ndarray) -> Encoding:
    return encoding_of_weights(weight, spec_of(name))


def test_e2m1_has_the_values_of_the_specification():
    assert list(CODE_TABLES["float4e2m1"].values) == [-v for v in E2M1[:0:-1]] + E2M1
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 7: 6, 1e30: 6, np.inf: 6}
    for x, y in ties.items():
        assert cast_float(np.array([x, -x]), "float4e2m1").tolist() == [y, -y], x


def test_e2m1_agrees_with_ml_dtypes():
    kind = pytest.importorskip("ml_dtypes").float4_e2m1fn
    middles = np.arange(-6, 6.01, 0.25, dtype=np.float32)
    x = np.concatenate([NORMAL * 3, middles, *(np.nextafter(middles, np.float32(e)) for e in (-9, 9))])
    expected = np.clip(x, -6, 6).astype(kind).astype(np.float32)
    assert np.array_equal(cast_float(x, "float4e2m1"), expected)


def test_nf4_has_the_values_of_qlora_and_takes_the_nearest():
    values = np.array(CODE_TABLES["nf4"].values)
    assert len(values) == 16 and (values[0], values[7], values[15]) == (-1, 0, 1)
    assert np.array_equal(values.astype(np.float32), values)
    x = np.concatenate([NORMAL / 2, values.astype(np.float32)])
    found = cast_float(x, "nf4").astype(np.float64)
    assert set(found) <= set(values)
    assert np.array_equal(np.abs(x - found), np.abs(x[:, None] - values).min(axis=1))


@pytest.mark.parametrize("format", CODE_TABLES)
def test_frameworks_round_by_the_same_thresholds(format):
    table = CODE_TABLES[format]
    edges = np.array(table.above, np.float32)
    x = np.concatenate([NORMAL, edges, np.nextafter(edges, np.float32(9)), np.float32([np.inf, -np.inf, np.nan, 0])])
    assert np.array_equal(table.rounded(NUMPY, x), cast_float(x, format), equal_nan=True)
    assert np.isnan(cast_float(np.float32([np.nan]), format)).all()


@pytest.mark.parametrize(
    ("name", "extreme", "scale"),
    [
        ("mxfp4", 6, 1), ("mxfp4", 4, 1), ("mxfp4", 7.99, 1), ("mxfp4", 8, 2), ("mxfp4", 3.99, 0.5),
        ("mxfp4", 1e-30, 2.0**-102), ("mxfp4", 3e38, 2.0**125),
        ("mxfp8", 448, 1), ("mxfp8", 256, 1), ("mxfp8", 255, 0.5), ("mxfp8", 512, 2),
        ("mxfp8_e5m2", 57344, 1), ("mxfp8_e5m2", 32767, 0.5),
    ],
)  # fmt: skip
def test_shared_exponents_are_those_of_the_specification(name, extreme, scale):
    weight = np.zeros((2, 64), np.float32)
    weight[0, 5], weight[1, 40] = extreme, -extreme
    encoding = made(name, weight)
    assert encoding.scale[0, 0] == encoding.scale[1, 1] == scale
    assert not encoding.fake_quantize(weight)[:, :5].any()  # blocks of zeros stay zeros
    largest = 6 * scale if name == "mxfp4" else extreme
    assert abs(encoding.fake_quantize(weight)[0, 5]) <= max(largest, extreme)


def test_what_exceeds_the_largest_element_saturates():
    weight = np.full((1, 32), 0.1, np.float32)
    weight[0, 0] = 7.9
    assert made("mxfp4", weight).fake_quantize(weight)[0, 0] == 6


def test_scales_of_nvfp4_are_float8_numbers_times_that_of_the_tensor():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    weight = NORMAL[:4096].reshape(16, 256) * np.geomspace(1e-3, 1, 16, dtype=np.float32)[:, None]
    encoding = made("nvfp4", weight)
    extremes = np.abs(weight.reshape(16, 16, 16)).max(axis=-1)
    assert encoding.tensor_scale == np.float32(extremes.max() / np.float64(6) / 448)
    factors = (extremes / np.float64(6) / encoding.tensor_scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    expected = np.maximum(factors.astype(np.float32), np.float32(2.0**-9)) * np.float32(encoding.tensor_scale)
    assert np.array_equal(encoding.scale, expected)
    smaller = encoding.with_(scale=encoding.scale * np.float32(0.9))
    assert smaller.tensor_scale == encoding.tensor_scale  # a technique's scales are multiples of the same one
    assert np.array_equal(typed_scale(smaller.scale, "float8e4m3fn", 4, encoding.tensor_scale), smaller.scale)


@pytest.mark.parametrize("name", TYPES)
def test_rounded_weights_stay_and_elements_are_the_nearest(name):
    weight = NORMAL[: 8 * 128].reshape(8, 128) * np.float32(0.02)
    encoding = made(name, weight)
    once = encoding.fake_quantize(weight)
    assert np.array_equal(encoding.fake_quantize(once), once)
    assert np.array_equal(made(name, weight).scale, encoding.scale)
    if encoding.float_format in CODE_TABLES:
        scale = np.repeat(encoding.scale, 128 // encoding.scale.shape[1], axis=1)
        points = np.array(CODE_TABLES[encoding.float_format].values, np.float32) * scale[..., None]
        nearest = np.abs(weight[..., None].astype(np.float64) - points).min(axis=-1)
        assert np.allclose(np.abs(weight.astype(np.float64) - once), nearest, rtol=1e-5)
    again = encoding_of_arrays(encoding_arrays(encoding))
    assert again.equals(encoding)
    assert (again.scale_type, again.tensor_scale) == (encoding.scale_type, encoding.tensor_scale)


def test_a_tensor_of_zeros():
    for name in TYPES:
        assert not made(name, np.zeros((2, 64), np.float32)).fake_quantize(np.zeros((2, 64), np.float32)).any()


def test_types_as_users_write_them():
    assert parse_type("MXFP4") == (4, None, "float4e2m1", Blockwise(block_size=32))
    assert parse_type("mxfp8") == parse_type("mxfp8_e4m3") == (8, None, "float8e4m3fn", Blockwise(block_size=32))
    assert parse_type("nvfp4:block16") == parse_type("nvfp4") == (4, None, "float4e2m1", Blockwise(block_size=16))
    assert parse_type("nf4-block32") == (4, None, "nf4", Blockwise(block_size=32))
    assert [block_scales(t) for t in ("mxfp4", "nvfp4", "nf4", "int4:block32")] == [
        "float8e8m0", "float8e4m3fn", None, None,
    ]  # fmt: skip
    for wrong, said in {
        "mxfp4:block16": "blocks of 32",
        "nvfp4:lpbq16": "blocks of 16",
        "nf4:block0": "any size",
    }.items():
        with pytest.raises(InputError, match=said):
            parse_type(wrong)
    assert describe(spec_of("mxfp4")) == "float4e2m1, blocks of 32, float8e8m0 scales"


def test_what_isnt_a_matrix_in_blocks():
    """Tables of rows are integers, as with int4; a layer whose inputs no block divides has a scale for each channel."""
    b = Builder(0)
    x = b.relu("relu", b.conv("wide", b.input("x", 32, 4, 4), 64))
    graph = b.build(b.conv("odd", b.conv("narrow", x, 3), 8)).graph
    found = build_plan(graph, load_target("generic_int8"), weights="mxfp4", activations="float")
    specs = {op.id: found.spec(op.weight) for op in graph.linear_ops}
    assert specs["wide"].granularity == Blockwise(0, 1, 32) and specs["wide"].scale_type == "float8e8m0"
    assert specs["odd"].float_format == "float4e2m1" and specs["odd"].scale_type is None
    assert any("odd" in note for note in found.notes)
    with pytest.raises(InputError, match="blocks are for weights"):
        build_plan(graph, load_target("generic_int8"), activations="mxfp8")


@pytest.mark.parametrize("name", TYPES)
def test_in_training_scales_of_a_type_stay(name):
    policies = [
        GridPolicy.of(made(name, NORMAL[:256].reshape(2, 128)), parameter=True, range_learning=learning)
        for learning in (False, True)
    ]
    moves = name == "nf4"  # its scales are any float32
    assert policies == [GridPolicy(False, False, moves), GridPolicy(moves, False, False)]


def test_a_pinned_range_of_one_scale():
    spec = QuantSpec(4, float_format="float4e2m1")
    assert encoding_from_range(spec, -3.0, 2.0).scale == np.float32(0.5)
