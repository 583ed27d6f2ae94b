"""Files as AIMET writes them: they load, mean what AIMET means by them, and are saved unchanged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bitwright.errors import EncodingError
from bitwright.formats import TensorGeometry, bind, convert, dumps, loads, read
from bitwright.grids import Blockwise, PerChannel, PerTensor, QuantSpec

HEAD = {"producer": {"package": "aimet-torch", "version": "2.42.0"}}
TAIL = {
    "excluded_layers": [],
    "quantizer_args": {"activation_bitwidth": 8, "param_bitwidth": 8, "dtype": "int", "is_symmetric": True},
}


def _v06(bits, symmetric, low, high, scale, offset):
    return {
        "bitwidth": bits, "dtype": "int", "is_symmetric": symmetric, "min": low, "max": high, "scale": scale,
        "offset": offset,
    }  # fmt: skip


V06 = {
    "version": "0.6.1", **HEAD,
    "activation_encodings": {
        "input": [_v06(16, "False", -2.1788, 1.54098, 5.676e-05, -38386)],
        "/relu/Relu_output_0": [_v06(16, "False", 0.0, 1.60632, 2.451e-05, 0)],
    },
    "param_encodings": {
        "conv.weight": [
            _v06(8, "True", -0.52689, 0.52278, 0.0041164, -128), _v06(8, "True", -0.53559, 0.53141, 0.0041843, -128),
        ],
        "half.weight": [{"bitwidth": 16, "dtype": "float"}],
    },
    **TAIL,
}  # fmt: skip
V10 = {
    "version": "1.0.0", **HEAD,
    "activation_encodings": [
        {"name": "input", "dtype": "INT", "bw": 16, "is_sym": False, "scale": [5.676e-05], "offset": [-38386],
         "enc_type": "PER_TENSOR"},
    ],
    "param_encodings": [
        {"name": "conv.weight", "dtype": "INT", "bw": 8, "is_sym": True, "scale": [0.0041164, 0.0041843],
         "offset": [-128, -128], "enc_type": "PER_CHANNEL"},
        {"name": "bq.weight", "dtype": "INT", "bw": 4, "is_sym": True, "scale": [0.01007, 0.06468, 0.03935, 0.06171],
         "offset": [-8, -8, -8, -8], "enc_type": "PER_BLOCK", "block_size": 2},
        {"name": "fc.weight", "dtype": "INT", "bw": 8, "is_sym": True, "scale": [0.00383749, 0.00216372],
         "offset": [-128, -128], "enc_type": "LPBQ", "block_size": 2, "compressed_bw": 4,
         "per_block_int_scale": [15, 16, 16, 15]},
        {"name": "h.weight", "dtype": "FLOAT", "bw": 16, "enc_type": "PER_TENSOR"},
    ],
    **TAIL,
}  # fmt: skip
LPBQ_20 = {
    "name": "fc.weight", "output_dtype": "int4", "axis": 1, "block_size": 2,
    "per_block_int_scale": [[15, 16], [16, 15]],
    "per_channel_float_scale": [[0.00383749], [0.00216372]],
}  # fmt: skip
LPBQ_21 = {
    "name": "fc.weight", "output_dtype": "int4", "axis": 1, "block_size": 2,
    "y_scale": {"x": [[15, 16], [16, 15]], "x_scale": [0.00383749, 0.00216372], "axis": -2},
}  # fmt: skip
V20 = {
    "version": "2.0.0", **HEAD,
    "encodings": [
        {"name": "conv.weight", "output_dtype": "int8", "y_scale": [0.0041164, 0.0041843], "axis": 0},
        {"name": "conv.bias", "output_dtype": "int32", "y_scale": [2.336e-07, 2.375e-07], "axis": 0},
        {"name": "input", "output_dtype": "uint16", "y_scale": 5.676e-05, "y_zero_point": 38386},
        {"name": "bq.weight", "output_dtype": "int4", "y_scale": [[0.01007, 0.06468], [0.03935, 0.06171]], "axis": 1,
         "block_size": 2},
        LPBQ_20,
    ],
}  # fmt: skip
V21 = {**V20, "version": "2.1.0", "encodings": [*V20["encodings"][:-1], LPBQ_21]}
SAMPLES = {"0.6.1": V06, "1.0.0": V10, "2.0.0": V20, "2.1.0": V21}
GEOMETRIES = {
    "conv.weight": TensorGeometry((2, 3, 1, 1), 0, 1),
    "conv.bias": TensorGeometry((2,), 0),
    "bq.weight": TensorGeometry((2, 4), 0, 1),
    "fc.weight": TensorGeometry((2, 4), 0, 1),
}


def bound(sample, name):
    return bind(read(sample).entries[name], GEOMETRIES.get(name))


@pytest.mark.parametrize("version", SAMPLES)
def test_load_and_save_keep_every_value(version):
    assert json.loads(dumps(read(SAMPLES[version]))) == SAMPLES[version]


@pytest.mark.parametrize("version", SAMPLES)
def test_activation(version):
    encoding = bound(SAMPLES[version], "input")
    assert (encoding.bits, encoding.signed, encoding.symmetric) == (16, False, False)
    assert encoding.zero_point == 38386
    assert encoding.scale == np.float32(5.676e-05)
    assert isinstance(encoding.granularity, PerTensor)


@pytest.mark.parametrize("version", SAMPLES)
def test_channels(version):
    encoding = bound(SAMPLES[version], "conv.weight")
    assert (encoding.bits, encoding.signed, encoding.symmetric) == (8, True, True)
    assert encoding.granularity == PerChannel(0)
    assert encoding.scale.tolist() == np.float32([0.0041164, 0.0041843]).tolist()
    assert not encoding.zero_point.any()
    # (x_int + offset)·scale of AIMET's unsigned convention is (q − zero_point)·scale of ours.
    assert np.allclose(encoding.minimum, [-0.52689, -0.53559], atol=2e-5)
    assert np.allclose(encoding.maximum, [0.52278, 0.53141], atol=2e-5)


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "2.1.0"])
def test_blocks(version):
    encoding = bound(SAMPLES[version], "bq.weight")
    assert encoding.granularity == Blockwise(0, 1, 2)
    assert np.array_equal(encoding.scale, np.float32([[0.01007, 0.06468], [0.03935, 0.06171]]))


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "2.1.0"])
def test_two_level_scales(version):
    encoding = bound(SAMPLES[version], "fc.weight")
    assert encoding.granularity == Blockwise(0, 1, 2, 8)
    assert encoding.bits == 4
    assert encoding.block_scale.tolist() == [[15, 16], [16, 15]]
    gamma = np.float32([0.00383749, 0.00216372])[:, None]
    assert np.array_equal(encoding.scale, np.float32([[15, 16], [16, 15]]) * gamma)


def test_simulated_outputs_agree_across_schemas():
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32) / 10
    for name in ("bq.weight", "fc.weight"):
        outputs = [bound(SAMPLES[v], name).fake_quantize(x) for v in ("1.0.0", "2.0.0", "2.1.0")]
        assert np.array_equal(outputs[0], outputs[1])
        assert np.array_equal(outputs[0], outputs[2])


def test_bias_and_float16():
    bias = bound(V20, "conv.bias")
    assert (bias.bits, bias.signed, bias.symmetric) == (32, True, True)
    assert bind(read(V06).entries["half.weight"]).float_format == "float16"
    assert bind(read(V10).entries["h.weight"]).float_format == "float16"


def test_headerless_files_of_aimet():
    sections = {k: V06[k] for k in ("activation_encodings", "param_encodings")}
    assert set(read(sections).entries) == set(read(V06).entries)
    adaround = {"param_encodings": V06["param_encodings"]}
    assert list(read(adaround).parameters) == ["conv.weight", "half.weight"]
    flat = read(V06["param_encodings"])  # AdaRound's form in early releases
    assert list(flat.parameters) == ["conv.weight", "half.weight"]
    listed = {"param_encodings": V10["param_encodings"]}
    assert read(listed).version == "1.0.0"


def test_offsets_as_floats_and_booleans_of_either_kind():
    entry = _v06(8, True, -2.0, 1.984375, 0.015625, -128.0)
    file = read({"version": "0.6.1", "activation_encodings": {"x": [entry]}, "param_encodings": {}})
    assert bind(file.entries["x"]).zero_point == 0
    item = {**V10["activation_encodings"][0], "is_sym": "False", "offset": [-38386.0]}
    file = read({"version": "1.0.0", "activation_encodings": [item], "param_encodings": []})
    assert bind(file.entries["input"]).zero_point == 38386


def test_version_0_4_0_has_no_dtype():
    entry = {k: v for k, v in _v06(8, "False", -1.0, 1.55, 0.01, -100).items() if k != "dtype"}
    document = {"version": "0.4.0", "activation_encodings": {"x": [entry]}, "param_encodings": {}}
    assert bind(read(document).entries["x"]).zero_point == 100
    with pytest.raises(EncodingError, match="tensor 'x': field 'dtype': required"):
        read({**document, "version": "0.5.0"})


@pytest.mark.parametrize(
    ("symmetric", "low", "high", "scale", "zero_point", "signed", "strict"),
    [
        ("False", -1.0, 2.0, 3 / 255, 85, False, False),
        ("True", -1.28, 1.27, 0.01, 0, True, False),
        ("True", -1.27, 1.27, 0.01, 0, True, True),
        ("True", 0.0, 2.55, 0.01, 0, False, False),
    ],
)
def test_a_range_alone_is_enough(symmetric, low, high, scale, zero_point, signed, strict):
    entry = {"bitwidth": 8, "dtype": "int", "is_symmetric": symmetric, "min": low, "max": high}
    encoding = bind(read({"version": "0.6.1", "activation_encodings": {"x": [entry]}}).entries["x"])
    assert encoding.scale == pytest.approx(scale, rel=1e-6)
    assert (int(encoding.zero_point), encoding.signed, encoding.strict) == (zero_point, signed, strict)


def test_per_channel_and_blockwise_lists_of_0_6_1_are_told_apart_by_the_tensor():
    items = [_v06(4, "True", -8 * s, 7 * s, s, -8) for s in (1.0, 2.0, 3.0, 4.0)]
    entry = read({"version": "0.6.1", "param_encodings": {"w": items}}).entries["w"]
    assert bind(entry, TensorGeometry((4, 6), 0, 1)).granularity == PerChannel(0)
    blocks = bind(entry, TensorGeometry((2, 6), 0, 1))
    assert blocks.granularity == Blockwise(0, 1, 3)
    assert blocks.scale.tolist() == [[1, 2], [3, 4]]
    stored_in_out = bind(entry, TensorGeometry((6, 2), 1, 0))  # row-major: block by block
    assert stored_in_out.scale.tolist() == [[1, 3], [2, 4]]
    for shape in ((3, 6), (2, 5)):
        with pytest.raises(EncodingError, match="4 scales don't fit blocks"):
            bind(entry, TensorGeometry(shape, 0, 1))
    with pytest.raises(EncodingError, match="channel axis isn't in the file"):
        bind(entry)


def test_blocks_of_1_0_0_are_listed_by_channel_for_matrices_and_row_major_otherwise():
    entry = read(V10).entries["bq.weight"]
    channels_first = bind(entry, TensorGeometry((2, 4), 0, 1)).scale
    assert np.array_equal(bind(entry, TensorGeometry((4, 2), 1, 0)).scale, channels_first)
    transposed_conv = bind(entry, TensorGeometry((4, 2, 3, 3), 1, 0)).scale
    assert np.array_equal(transposed_conv, channels_first.reshape(-1).reshape(2, 2).T)


def test_unsigned_symmetric_and_strict_are_known_by_their_offsets():
    def entry(offset):
        item = {"name": "x", "dtype": "INT", "bw": 8, "is_sym": True, "scale": [0.5], "offset": [offset],
                "enc_type": "PER_TENSOR"}  # fmt: skip
        return bind(read({"version": "1.0.0", "activation_encodings": [item]}).entries["x"])

    assert (entry(0).signed, entry(0).grid.qmax, int(entry(0).zero_point)) == (False, 255, 0)
    assert (entry(-127).strict, entry(-127).grid.qmin, int(entry(-127).zero_point)) == (True, -127, 0)
    assert (entry(-128).strict, entry(-128).grid.qmin) == (False, -128)


def test_a_spec_settles_how_codes_are_stored_and_values_stay():
    x = np.linspace(-3, 3, 4001, dtype=np.float32)
    entry = read(V10).entries["input"]
    plain, signed = bind(entry), bind(entry, spec=QuantSpec(16, signed=True, symmetric=False))
    assert (plain.signed, signed.signed, int(signed.zero_point)) == (False, True, 38386 - 32768)
    assert np.array_equal(plain.fake_quantize(x), signed.fake_quantize(x))
    strict = bind(read(V20).entries["conv.weight"], GEOMETRIES["conv.weight"], QuantSpec(8, strict=True))
    assert strict.strict


def test_torch_module_files_are_refused_with_the_way_out():
    document = {"activation_encodings": {"conv1": {"input": {"0": {}}}}, "param_encodings": {}}
    with pytest.raises(EncodingError, match=r"names PyTorch modules.*use the \.encodings file"):
        read(document)


def test_conversion_of_aimet_files_needs_the_model_only_for_what_they_do_not_say():
    with pytest.raises(EncodingError, match=r"'conv\.weight': schema 2\.0\.0 records the channel axis.*\(and 2 more\)"):
        convert(read(V10), "2.0.0")
    with pytest.raises(EncodingError, match="activations and parameters apart"):
        convert(read(V20), "1.0.0")
    there = convert(read(V10), "2.0.0", GEOMETRIES)
    assert there.warnings == ("tensor 'h.weight': it has no entry any more: 2.x leaves float16 tensors out",)
    assert list(there.file.parameters) == ["conv.weight", "bq.weight", "fc.weight", "h.weight"]
    written = {e["name"]: e for e in json.loads(dumps(there.file))["encodings"]}
    assert written["fc.weight"] == LPBQ_20
    again = loads(dumps(there.file))
    back = convert(again, "1.0.0")
    assert json.loads(dumps(back.file))["param_encodings"] == V10["param_encodings"]
    assert json.loads(dumps(back.file))["activation_encodings"] == V10["activation_encodings"]
    one_zero = convert(read(V20), "1.0.0", GEOMETRIES).file
    assert list(one_zero.activations) == ["input"]


def test_channels_of_0_6_1_become_per_channel_with_a_warning_unless_the_model_is_given():
    loose = convert(read(V06), "1.0.0")
    assert "conv.weight" in loose.warnings[0]
    assert json.loads(dumps(loose.file))["param_encodings"][0] == V10["param_encodings"][0]
    assert convert(read(V06), "1.0.0", GEOMETRIES).warnings == ()
