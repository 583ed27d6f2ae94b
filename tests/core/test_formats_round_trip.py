"""Random encodings through every schema, and through chains of schemas, come back equal to the bit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import EncodingError
from bitwright.formats import (
    VERSIONS,
    EncodingsFile,
    TensorGeometry,
    bind,
    convert,
    diff,
    dumps,
    inverse,
    loads,
    permute,
    unbind,
)
from bitwright.grids import (
    Blockwise,
    Encoding,
    PerChannel,
    PerTensor,
    QuantSpec,
    block_scales,
    encoding_of_weights,
    parse_type,
    scale_shape,
    two_level,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # ranges of the largest scales
SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)
positive = st.floats(
    float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max), width=32, allow_subnormal=True
)
moderate = st.floats(2.0**-20, 2.0**10, width=32)


@st.composite
def tensors(draw):
    """(encoding in native axes, geometry)"""
    rank = draw(st.integers(2, 4))
    axis, block_axis = draw(st.permutations(range(rank)))[:2]
    size = draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape[block_axis] *= size
    layout = draw(st.sampled_from(["tensor", "channel", "block", "lpbq"]))
    bits = draw(st.sampled_from([2, 3, 4, 8, 16, 32] if layout != "lpbq" else [4]))
    granularity = {
        "tensor": PerTensor(),
        "channel": PerChannel(axis),
        "block": Blockwise(axis, block_axis, size),
        "lpbq": Blockwise(axis, block_axis, size, 8),
    }[layout]
    form = scale_shape(tuple(shape), granularity)
    n = int(np.prod(form))
    number = moderate if layout == "lpbq" else positive
    scale = np.array(draw(st.lists(number, min_size=n, max_size=n)), np.float32).reshape(form)
    if layout == "lpbq":
        return two_level(Encoding(bits, True, True, scale, np.zeros(form, np.int32), granularity)), TensorGeometry(
            tuple(shape), axis, block_axis
        )
    symmetric = draw(st.booleans()) or bits == 32
    signed = draw(st.booleans()) or bits == 32
    strict = symmetric and draw(st.booleans())
    middle = 0 if signed else 2 ** (bits - 1)
    low = -(2 ** (bits - 1)) if signed else 0
    if symmetric:
        unsigned_symmetric = not signed and not strict and draw(st.booleans())
        zero = np.full(form, 0 if unsigned_symmetric else middle)
    else:
        zero = np.array(draw(st.lists(st.integers(low, low + 2**bits - 1), min_size=n, max_size=n))).reshape(form)
    encoding = Encoding(bits, signed, symmetric, scale, zero.astype(np.int32), granularity, strict)
    return encoding, TensorGeometry(tuple(shape), axis, block_axis)


def file_of(encoding, geometry):
    return EncodingsFile(parameters={"w": unbind(encoding, geometry.shape)})


@pytest.mark.parametrize("version", VERSIONS)
@given(case=tensors())
@SETTINGS
def test_every_schema(version, case):
    encoding, geometry = case
    text = dumps(file_of(encoding, geometry), version)
    file = loads(text)
    again = bind(file.parameters["w"], geometry)
    if version == "0.6.1" and encoding.block_scale is not None:
        assert np.array_equal(again.scale, encoding.scale)
        return
    assert again.equals(encoding)
    if encoding.block_scale is not None:
        assert np.array_equal(again.block_scale, encoding.block_scale)
    assert dumps(file) == text


@given(case=tensors(), route=st.lists(st.sampled_from(VERSIONS[1:]), min_size=1, max_size=4))
@SETTINGS
def test_chains_of_conversions(case, route):
    encoding, geometry = case
    first = file = file_of(encoding, geometry)
    for version in route:
        file = loads(dumps(convert(file, version).file))
    assert bind(file.parameters["w"]).equals(encoding)
    assert diff(first, file) == []


@given(case=tensors())
@SETTINGS
def test_foreign_readers_see_the_same_grid(case):
    """Without bitwright's notes, the file and the tensor's geometry give the same real values."""
    encoding, geometry = case
    file = file_of(encoding, geometry)
    for version in VERSIONS:
        document = json.loads(dumps(file, version))
        document["producer"].pop("bitwright", None)
        plain = loads(json.dumps(document))
        entry = plain.entries["w"]
        got = bind(entry, geometry)
        assert np.array_equal(got.scale.reshape(-1), encoding.scale.reshape(-1))
        lowest, highest = got.minimum.reshape(-1), got.maximum.reshape(-1)
        assert np.array_equal(highest, encoding.maximum.reshape(-1))
        if not (encoding.strict and version[0] == "2"):  # which can't leave the lowest code out
            assert np.array_equal(lowest, encoding.minimum.reshape(-1))
        hint = QuantSpec(
            encoding.bits, encoding.signed, encoding.symmetric, encoding.strict,
            unsigned_symmetric=encoding.symmetric and not encoding.signed and not encoding.zero_point.any(),
        )  # fmt: skip
        hinted = bind(entry, geometry, hint)
        assert (hinted.signed, hinted.symmetric, hinted.strict) == (
            encoding.signed,
            encoding.symmetric,
            encoding.strict,
        ) or not encoding.symmetric


@given(scale=positive)
@SETTINGS
def test_numbers_are_exact_in_single_and_double_precision(scale):
    encoding = Encoding(8, True, True, np.float32(scale), np.int32(0))
    written = json.loads(dumps(EncodingsFile({"x": unbind(encoding)}, version="2.0.0")))["encodings"][0]["y_scale"]
    assert written == float(np.float32(scale))


@pytest.mark.parametrize("format", ["float8e4m3fn", "float8e5m2"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), Blockwise(0, 1, 2)])
def test_fp8_in_2_x_and_nowhere_else(format, granularity):
    form = scale_shape((2, 4), granularity)
    scale = np.linspace(0.1, 0.7, int(np.prod(form)), dtype=np.float32).reshape(form)
    encoding = Encoding(8, True, True, scale, np.zeros(form, np.int32), granularity, float_format=format)
    file = EncodingsFile(parameters={"w": unbind(encoding, (2, 4))})
    for version in ("2.0.0", "2.1.0"):
        assert bind(loads(dumps(file, version)).entries["w"]).equals(encoding)
    for version in ("0.6.1", "1.0.0"):
        with pytest.raises(EncodingError, match=f"'w': schema {version} has no {format}"):
            dumps(file, version)


def float_blocks(name, weight):
    """The encoding of a matrix in a type of float blocks."""
    bits, _, format, layout = parse_type(name)
    layout = replace(layout, block_size=4)
    return encoding_of_weights(
        weight, QuantSpec(bits, granularity=layout, float_format=format, scale_type=block_scales(name))
    )


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxfp8_e5m2", "nvfp4", "nf4"])
def test_blocks_of_floats_in_2_x_and_nowhere_else(name):
    weight = np.random.default_rng(3).standard_normal((3, 8)).astype(np.float32)
    encoding = float_blocks(name, weight)
    file = EncodingsFile(parameters={"w": unbind(encoding, (3, 8))})
    for version in ("2.0.0", "2.1.0"):
        text = dumps(file, version)
        again = bind(loads(text).entries["w"])
        assert again.equals(encoding)
        assert (again.scale_type, again.tensor_scale) == (encoding.scale_type, encoding.tensor_scale)
        assert np.array_equal(again.fake_quantize(weight), encoding.fake_quantize(weight))
        assert dumps(loads(text)) == text
        document = json.loads(text)
        document["producer"].pop("bitwright", None)
        plain = bind(loads(json.dumps(document)).entries["w"], TensorGeometry((3, 8), 0, 1))
        assert np.array_equal(plain.fake_quantize(weight), encoding.fake_quantize(weight))
    for version in ("0.6.1", "1.0.0"):
        with pytest.raises(EncodingError, match=f"'w': schema {version} has no {encoding.float_format}"):
            dumps(file, version)


def test_nvfp4_is_as_the_schema_has_it():
    weight = np.random.default_rng(4).standard_normal((2, 8)).astype(np.float32)
    encoding = float_blocks("nvfp4", weight)
    (entry,) = json.loads(dumps(EncodingsFile(parameters={"w": unbind(encoding, (2, 8))}), "2.1.0"))["encodings"]
    assert (entry["output_dtype"], entry["axis"], entry["block_size"]) == ("float4e2m1", 1, 4)
    x, whole = np.array(entry["y_scale"]["x"], np.float32), np.float32(entry["y_scale"]["x_scale"])
    assert x.max() == 448 and entry["y_scale"]["input_dtype"] == "float8e4m3fn"
    assert np.array_equal(x * whole, encoding.scale)


def test_a_scale_that_is_no_number_of_its_type_is_refused():
    weight = np.random.default_rng(5).standard_normal((2, 8)).astype(np.float32)
    text = dumps(EncodingsFile(parameters={"w": unbind(float_blocks("mxfp4", weight), (2, 8))}), "2.1.0")
    document = json.loads(text)
    document["encodings"][0]["y_scale"][1][0] *= 1.25
    with pytest.raises(EncodingError, match="should be float8e8m0 numbers"):
        bind(loads(json.dumps(document)).entries["w"])


def test_bfloat16_is_left_out_of_2_x_and_refused_before():
    encoding = Encoding(16, True, True, np.float32(1), np.int32(0), float_format="bfloat16")
    file = EncodingsFile({"x": unbind(encoding)})
    for version in ("2.0.0", "2.1.0"):
        text = dumps(file, version)
        assert json.loads(text)["encodings"] == []
        assert bind(loads(text).entries["x"]).equals(encoding)
    for version in ("0.6.1", "1.0.0"):
        with pytest.raises(EncodingError, match="has no bfloat16"):
            dumps(file, version)


@given(case=tensors(), data=st.data())
@SETTINGS
def test_permute_and_its_inverse(case, data):
    encoding, geometry = case
    layout = tuple(data.draw(st.permutations(range(len(geometry.shape)))))
    native = permute(encoding, layout)
    assert permute(native, inverse(layout)).equals(encoding)
    if encoding.bits > 16 or not np.isfinite(encoding.maximum).all():
        return
    x = np.random.default_rng(0).normal(size=geometry.shape).astype(np.float32) * encoding.scale.mean()
    # Canonical axis i is native axis layout[i].
    stored = x.transpose(inverse(layout))
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(native.fake_quantize(stored).transpose(layout), encoding.fake_quantize(x), equal_nan=True)


def test_gemm_weight_stored_in_out_gets_axis_1():
    encoding = Encoding(8, True, True, np.ones(3, np.float32), np.zeros(3, np.int32), PerChannel(0))
    assert permute(encoding, (1, 0)).granularity == PerChannel(1)
    assert permute(encoding, None) is encoding
    with pytest.raises(EncodingError, match="axis 0 of an encoding, but the layout"):
        permute(encoding, ())


def test_blocks_need_the_shape_and_lpbq_its_factors():
    blocks = Encoding(4, True, True, np.ones((2, 2), np.float32), np.zeros((2, 2), np.int32), Blockwise(0, 1, 2))
    with pytest.raises(EncodingError, match="give unbind the shape"):
        unbind(blocks)
    with pytest.raises(EncodingError, match="4 scales don't fit blocks of 2"):
        unbind(blocks, (2, 6))
    with pytest.raises(EncodingError, match="without block_scale"):
        unbind(blocks.with_(granularity=Blockwise(0, 1, 2, 8)), (2, 4))
    wrong = blocks.with_(
        granularity=Blockwise(0, 1, 2, 8),
        scale=np.array([[1, 1.7], [1, 2]], np.float32),
        block_scale=np.array([[1, 2], [1, 2]], np.int32),
    )
    with pytest.raises(EncodingError, match="channel 0: the block scales aren't integer multiples"):
        unbind(wrong, (2, 4))


def test_channel_scale_is_found_for_any_factors():
    rng = np.random.default_rng(1)
    gamma = rng.uniform(1e-4, 1, (4000, 1)).astype(np.float32)
    factors = rng.integers(1, 17, (4000, 3)).astype(np.int32)
    scale = (factors * gamma).astype(np.float32)
    encoding = Encoding(
        4, True, True, scale, np.zeros(scale.shape, np.int32), Blockwise(0, 1, 2, 8), block_scale=factors
    )
    entry = unbind(encoding, (4000, 6))
    assert np.array_equal(entry.scales, scale)
    assert np.array_equal(entry.block_scale, factors)
