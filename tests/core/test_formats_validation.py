"""Every rule of every schema, broken once; the message names file, tensor and field."""

from __future__ import annotations

import copy
import json

import pytest

from bitwright.errors import EncodingError
from bitwright.formats import EncodingsFile, dumps, loads, read

INT_06 = {
    "bitwidth": 8,
    "dtype": "int",
    "is_symmetric": "True",
    "min": -1.28,
    "max": 1.27,
    "scale": 0.01,
    "offset": -128,
}
INT_10 = {"name": "w", "dtype": "INT", "bw": 8, "is_sym": True, "scale": [0.1, 0.2], "offset": [-128, -128],
          "enc_type": "PER_CHANNEL"}  # fmt: skip
BLOCK_10 = {**INT_10, "bw": 4, "offset": [-8, -8], "enc_type": "PER_BLOCK", "block_size": 2}
LPBQ_10 = {**INT_10, "enc_type": "LPBQ", "block_size": 2, "compressed_bw": 4, "per_block_int_scale": [1, 16, 3, 4]}
HALF_10 = {"name": "w", "dtype": "FLOAT", "bw": 16, "enc_type": "PER_TENSOR"}
CHANNEL_20 = {"name": "w", "output_dtype": "uint8", "y_scale": [0.1, 0.2], "y_zero_point": [3, 4], "axis": 0}
BLOCK_20 = {"name": "w", "output_dtype": "int4", "y_scale": [[0.1, 0.2], [0.3, 0.4]], "axis": 1, "block_size": 2}
LPBQ_20 = {"name": "w", "output_dtype": "int4", "axis": 1, "block_size": 2, "per_block_int_scale": [[1, 16], [3, 4]],
           "per_channel_float_scale": [[0.1], [0.2]]}  # fmt: skip
LPBQ_21 = {"name": "w", "output_dtype": "int4", "axis": 1, "block_size": 2,
           "y_scale": {"x": [[1, 16], [3, 4]], "x_scale": [0.1, 0.2], "axis": 0}}  # fmt: skip
NVFP4 = {"name": "w", "output_dtype": "float4e2m1", "axis": 1, "block_size": 2,
         "y_scale": {"x": [[1, 448], [3, 4]], "x_scale": 0.1, "input_dtype": "float8e4m3fn"}}  # fmt: skip


def document(version, entry):
    if version == "0.6.1":
        return {"version": version, "activation_encodings": {}, "param_encodings": {"w": entry}}
    if version == "1.0.0":
        return {"version": version, "activation_encodings": [], "param_encodings": [entry]}
    return {"version": version, "encodings": [entry]}


GONE = object()


def broken(entry, field, value):
    entry = copy.deepcopy(entry)
    target = entry
    *path, last = field.split("/")
    for step in path:
        target = target[step]
    if value is GONE:
        del target[last]
    else:
        target[last] = value
    return entry


CASES = [
    # version, entry, field, value, field named in the message, rest of the message
    *(("0.6.1", INT_06, f, GONE, f, "required") for f in ("bitwidth", "dtype", "is_symmetric", "scale", "offset")),
    ("0.6.1", INT_06, "bitwidth", 24, "bitwidth", "2 to 16 bits, or 32"),
    ("0.6.1", INT_06, "bitwidth", 1, "bitwidth", "outside 2..32"),
    ("0.6.1", INT_06, "bitwidth", "8", "bitwidth", "expected a whole number"),
    ("0.6.1", INT_06, "bitwidth", True, "bitwidth", "expected a whole number, found True"),
    ("0.6.1", INT_06, "dtype", "INT", "dtype", "none of int, float"),
    ("0.6.1", INT_06, "is_symmetric", "yes", "is_symmetric", "expected true or false"),
    ("0.6.1", INT_06, "scale", 0.0, "scale", "greater than 0"),
    ("0.6.1", INT_06, "scale", -1.0, "scale", "greater than 0"),
    ("0.6.1", INT_06, "scale", 1e-60, "scale", "in float32"),
    ("0.6.1", INT_06, "scale", 1e39, "scale", "in float32"),
    ("0.6.1", INT_06, "scale", "0.1", "scale", "expected numbers, found '0.1'"),
    ("0.6.1", INT_06, "scale", None, "scale", "expected numbers, found null"),
    ("0.6.1", INT_06, "scale", [0.1, 0.2], "scale", "one number"),
    ("0.6.1", INT_06, "offset", 1, "offset", "outside -255..0"),
    ("0.6.1", INT_06, "offset", -256, "offset", "outside -255..0"),
    ("0.6.1", INT_06, "offset", -127.5, "offset", "not a whole number"),
    ("0.6.1", INT_06, "min", -2.0, "min", "contradicts scale and offset"),
    ("0.6.1", INT_06, "max", 2.0, "max", "contradicts scale and offset"),
    ("0.6.1", INT_06, "zero_point", 0, "zero_point", "unknown field; the known ones are bitwidth"),
    ("0.6.1", INT_06, "rows_per_block", 4, "rows_per_block", "vector quantization isn't supported"),
    ("0.6.1", {"bitwidth": 16, "dtype": "float"}, "bitwidth", 8, "bitwidth", "16 bits"),
    ("0.6.1", {"bitwidth": 16, "dtype": "float"}, "scale", 1.0, "scale", "only bitwidth and dtype"),
    *(("1.0.0", INT_10, f, GONE, f, "required") for f in (
        "name", "dtype", "bw", "enc_type", "is_sym", "scale", "offset")),
    ("1.0.0", INT_10, "name", "", "name", "expected a string"),
    ("1.0.0", INT_10, "bw", 20, "bw", "2 to 16 bits, or 32"),
    ("1.0.0", INT_10, "enc_type", "PER_ROW", "enc_type", "none of PER_TENSOR"),
    ("1.0.0", INT_10, "enc_type", "VECTOR", "enc_type", "isn't supported"),
    ("1.0.0", INT_10, "enc_type", "PER_TENSOR", "scale", "2 scales, but enc_type is PER_TENSOR"),
    ("1.0.0", INT_10, "scale", [0.1], "offset", "2 offsets for 1 scales"),
    ("1.0.0", INT_10, "scale", [], "scale", "at least one"),
    ("1.0.0", INT_10, "scale", [0.1, [0.2]], "scale", "differ in length"),
    ("1.0.0", INT_10, "scale", [0.1, 0.0], "scale", "0.0"),
    ("1.0.0", INT_10, "offset", [-128, 5], "offset", "5 is outside -255..0"),
    ("1.0.0", INT_10, "block_size", 2, "block_size", "doesn't go with enc_type PER_CHANNEL"),
    ("1.0.0", INT_10, "compressed_bw", 4, "compressed_bw", "doesn't go with"),
    ("1.0.0", INT_10, "axis", 0, "axis", "unknown field"),
    ("1.0.0", INT_10, "zero_point_shift", [0.5, 0.5], "zero_point_shift", "aren't supported"),
    ("1.0.0", BLOCK_10, "block_size", GONE, "block_size", "required"),
    ("1.0.0", BLOCK_10, "block_size", 0, "block_size", "outside 1.."),
    *(("1.0.0", LPBQ_10, f, GONE, f, "required") for f in ("block_size", "compressed_bw", "per_block_int_scale")),
    ("1.0.0", LPBQ_10, "compressed_bw", 8, "compressed_bw", "aren't fewer than the decompressed 8"),
    ("1.0.0", LPBQ_10, "is_sym", False, "offset", "LPBQ is symmetric"),
    ("1.0.0", LPBQ_10, "offset", [-128, -127], "offset", "every offset -128"),
    ("1.0.0", LPBQ_10, "per_block_int_scale", [1, 17, 3, 4], "per_block_int_scale", "17 is outside 1..16"),
    ("1.0.0", LPBQ_10, "per_block_int_scale", [1, 0, 3, 4], "per_block_int_scale", "0 is outside 1..16"),
    ("1.0.0", LPBQ_10, "per_block_int_scale", [1, 2, 3], "per_block_int_scale", "3 block scales for 2 channels"),
    ("1.0.0", HALF_10, "bw", 8, "bw", "16 bits PER_TENSOR"),
    ("1.0.0", HALF_10, "scale", [1.0], "scale", "no such field"),
    *(("2.0.0", CHANNEL_20, f, GONE, f, "required") for f in ("name", "output_dtype", "y_scale")),
    ("2.0.0", CHANNEL_20, "output_dtype", "int24", "output_dtype", "none of int2"),
    ("2.0.0", CHANNEL_20, "output_dtype", "float6e3m2", "output_dtype", "none of int2"),
    ("2.0.0", CHANNEL_20, "y_scale", [0.1, float("1e-50")], "y_scale", "greater than 0"),
    ("2.0.0", CHANNEL_20, "y_scale", 0.1, "y_zero_point", "but y_scale has ()"),
    ("2.0.0", CHANNEL_20, "y_zero_point", [3, 256], "y_zero_point", "256 is outside 0..255"),
    ("2.0.0", CHANNEL_20, "y_zero_point", [3, -1], "y_zero_point", "-1 is outside 0..255"),
    ("2.0.0", CHANNEL_20, "y_zero_point", [3], "y_zero_point", "shape (1,)"),
    ("2.0.0", CHANNEL_20, "axis", GONE, "axis", "2 scales need an axis"),
    ("2.0.0", CHANNEL_20, "axis", "0", "axis", "expected a whole number"),
    ("2.0.0", CHANNEL_20, "bw", 8, "bw", "unknown field"),
    ("2.0.0", BLOCK_20, "axis", GONE, "axis", "required"),
    ("2.0.0", BLOCK_20, "axis", 2, "axis", "outside -2..1"),
    ("2.0.0", BLOCK_20, "block_size", GONE, "y_scale", "a list is expected"),
    ("2.0.0", BLOCK_20, "block_size", 1.5, "block_size", "expected a whole number"),
    ("2.0.0", BLOCK_20, "y_scale", [0.1, 0.2], "y_scale", "at least two"),
    ("2.0.0", BLOCK_20, "y_scale", [[[0.1, 0.2], [0.1, 0.2]], [[0.1, 0.2], [0.1, 0.2]]], "y_scale", "vary along"),
    *(("2.0.0", LPBQ_20, f, GONE, f, "required") for f in (
        "axis", "block_size", "per_block_int_scale", "per_channel_float_scale")),
    ("2.0.0", LPBQ_20, "y_scale", 0.1, "y_scale", "doesn't go with per_block_int_scale"),
    ("2.0.0", LPBQ_20, "output_dtype", "uint4", "output_dtype", "signed types"),
    ("2.0.0", LPBQ_20, "output_dtype", "float8e5m2", "output_dtype", "integer types"),
    ("2.0.0", LPBQ_20, "y_zero_point", 1, "y_zero_point", "symmetric grids only"),
    ("2.0.0", LPBQ_20, "per_block_int_scale", [[1, 17], [3, 4]], "per_block_int_scale", "exceeds 16"),
    ("2.0.0", LPBQ_20, "per_channel_float_scale", [[0.1], [0.2], [0.3]], "per_channel_float_scale", "3 channel scales"),
    ("2.1.0", LPBQ_21, "per_block_int_scale", [[1]], "per_block_int_scale", "unknown field"),
    ("2.1.0", LPBQ_21, "y_scale/x", GONE, "x", "required"),
    ("2.1.0", LPBQ_21, "y_scale/x_scale", [0.1, 0], "x_scale", "greater than 0"),
    ("2.1.0", LPBQ_21, "y_scale/input_dtype", "float8e5m2", "input_dtype", "integers (LPBQ) or float8e4m3fn"),
    ("2.1.0", LPBQ_21, "y_scale/input_dtype", "float8e4m3fn", "output_dtype", "scales of integers"),
    ("2.1.0", NVFP4, "y_scale/x", [[1, 448], [3, 4.1]], "x", "isn't one of float8e4m3fn"),
    ("2.1.0", NVFP4, "y_scale/x", [[1, 0], [3, 4]], "x", "greater than 0"),
    ("2.1.0", NVFP4, "y_scale/x_scale", [0.1, 0.2], "x_scale", "one for the tensor"),
    ("2.1.0", LPBQ_21, "y_scale/x_zero_point", [1], "x_zero_point", "aren't supported"),
    ("2.1.0", LPBQ_21, "y_scale/block_size", 4, "block_size", "aren't supported"),
    ("2.1.0", LPBQ_21, "y_scale/axis", 1, "axis", "channel axis 1 beside block axis 1"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "entry", "field", "value", "named", "message"), CASES)
def test_entry_rule(version, entry, field, value, named, message):
    wrap = (lambda e: [e]) if version == "0.6.1" else (lambda e: e)
    read(document(version, wrap(entry)))  # sound before it is broken
    text = json.dumps(document(version, wrap(broken(entry, field, value))))
    with pytest.raises(EncodingError) as caught:
        loads(text, "model.encodings")
    said = str(caught.value)
    assert said.startswith("model.encodings: ")
    assert named == "name" or "tensor 'w" in said
    assert f"field {named!r}: " in said
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "expected a list of encodings, found a list"),
        ({}, "expected a list of encodings, found an object"),
        (
            [INT_06, {**INT_06, "bitwidth": 4, "offset": -8, "min": -0.08, "max": 0.07}],
            "'bitwidth': the encodings of one",
        ),
        ([INT_06, {**INT_06, "is_symmetric": "False"}], "'is_symmetric': the encodings of one tensor differ"),
        ([INT_06, {"bitwidth": 16, "dtype": "float"}], "'is_symmetric': required"),
        ([{"bitwidth": 16, "dtype": "float"}] * 2, "a float tensor has one encoding"),
        ([INT_06, {k: v for k, v in INT_06.items() if k not in ("scale", "offset")}], "'scale': required"),
        ([{"bitwidth": 8, "dtype": "int", "is_symmetric": "False", "min": 1.0, "max": 2.0}], "min ≤ 0 ≤ max"),
        ([{"bitwidth": 8, "dtype": "int", "is_symmetric": "False", "min": 0.0, "max": 0.0}], "min < max"),
        ([7], "expected a JSON object, found 7"),
    ],
)
def test_lists_of_0_6_1(items, message):
    with pytest.raises(EncodingError, match="tensor 'w'") as caught:
        read(document("0.6.1", items))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON, corrupt or cut short (line 1"),
        ('{"version": "1.0.0", "activation_enc', "not valid JSON, corrupt or cut short"),
        ("[1, 2]", "expected a JSON object, found a list"),
        ("3", "expected a JSON object, found 3"),
        ('{"model": "resnet", "layers": []}', "not an encodings file: it has no version"),
        ("{}", "not an encodings file: it has no version"),
        ('{"version": "3.0.0", "encodings": []}', "'3.0.0' is none of 0.6.1, 1.0.0, 2.0.0, 2.1.0"),
        ('{"version": 1, "encodings": []}', "field 'version': 1 is none of"),
        ('{"version": ["1.0.0"], "encodings": []}', "field 'version': a list is none of"),
        ('{"version": "2.0.0"}', "field 'encodings': required"),
        ('{"version": "2.0.0", "encodings": {}}', "field 'encodings': expected a list"),
        ('{"version": "1.0.0"}', "neither activation_encodings nor param_encodings"),
        ('{"version": "0.6.1", "producer": {}}', "neither activation_encodings nor param_encodings"),
        ('{"version": "1.0.0", "param_encoding": []}', "field 'param_encoding': unknown field"),
        ('{"version": "1.0.0", "param_encodings": {}}', "field 'param_encodings': expected a list"),
        ('{"version": "0.6.1", "param_encodings": []}', "field 'param_encodings': expected an object"),
        ('{"version": "1.0.0", "param_encodings": [], "producer": 3}', "field 'producer': expected a JSON object"),
        ('{"version": "1.0.0", "param_encodings": [], "excluded_layers": [1]}', "field 'excluded_layers'"),
        ('{"version": "1.0.0", "param_encodings": ["w"]}', "param_encodings[0]: expected a JSON object, found 'w'"),
        ('{"version": "2.0.0", "encodings": [{"output_dtype": "int8"}]}', "encodings[0]: field 'name': required"),
        ('{"version": "2.0.0", "encodings": [{"name": "x", "y_scale": NaN}]}', "NaN is not a JSON number"),
        ('{"version": "2.0.0", "encodings": [{"name":"x","output_dtype":"int8","y_scale":1e999}]}', "'y_scale'"),
        ('{"version":"2.0.0","encodings":[{"name":"x","output_dtype":"int8","y_scale":' + "9" * 400 + "}]}", "range"),
        ('{"version":"2.0.0","encodings":[{"name":"x","output_dtype":"int8","y_scale":[1],"axis":1e999}]}', "'axis'"),
        ('{"version": "0.6.1", "param_encodings": {"w": [], "w": []}}', "'w' comes twice in one object"),
        ('{"version": "2.0.0", "version": "2.1.0"}', "'version' comes twice"),
        ("[" * 100000, "nested too deeply"),
        (b"\x08\x07\xff\xfe\x80", "binary, or not UTF-8"),
    ],
)  # fmt: skip
def test_files_that_are_none(text, message, tmp_path):
    path = tmp_path / "m.encodings"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(EncodingError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_duplicate_names(version):
    entry = INT_10 if version == "1.0.0" else CHANNEL_20
    text = document(version, entry)
    list(text.values())[-1].append(entry)
    with pytest.raises(EncodingError, match="tensor 'w': has two entries; keep one"):
        read(text)


def test_one_name_in_both_sections():
    with pytest.raises(EncodingError, match="'w' has two entries"):
        read({"version": "1.0.0", "activation_encodings": [INT_10], "param_encodings": [INT_10]})
    entry = read(document("1.0.0", INT_10)).entries["w"]
    with pytest.raises(EncodingError, match="'w' has two entries"):
        EncodingsFile({"w": entry}, {"w": entry})


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(EncodingError, match=r"can't read .*none\.encodings: No such file"):
        read(tmp_path / "none.encodings")
    with pytest.raises(EncodingError, match=r"can't read .*: Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (3, "expected a JSON object"),
        ({"colour": 1}, "'colour': unknown field"),
        ({"tensors": []}, "'tensors': expected a JSON object"),
        ({"tensors": {"w": {"axis": "x"}}}, "tensor 'w': field 'axis': expected a whole number"),
        ({"tensors": {"w": {"hue": 1}}}, "tensor 'w': field 'hue': unknown field"),
        ({"parameters": "w"}, "'parameters': expected a list of tensor names"),
        ({"casts": {"h": "float32"}}, "tensor 'h': field 'casts': 'float32' is none of"),
        ({"casts": {"h": ["float16"]}}, "tensor 'h': field 'casts': a list is none of"),
        ({"provenance": [{}]}, "'technique': required"),
        ({"provenance": {}}, "'provenance': expected a list"),
    ],
)
def test_bitwrights_own_notes(own, message):
    text = {**document("1.0.0", INT_10), "producer": {"package": "bitwright", "bitwright": own}}
    with pytest.raises(EncodingError, match="bitwright") as caught:
        read(text)
    assert message in str(caught.value)


def test_notes_never_overrule_the_entry_nor_bind_what_is_gone():
    own = {"tensors": {"w": {"axis": 1}, "gone": {"axis": 0}}, "parameters": ["w", "gone"], "casts": {"w": "float16"}}
    file = read({**document("2.0.0", CHANNEL_20), "producer": {"bitwright": own}})
    assert list(file.parameters) == ["w"]
    assert file.parameters["w"].axis == 0
    assert file.parameters["w"].float_format is None


def test_settings_that_json_cannot_hold():
    with pytest.raises(EncodingError, match="what JSON can't"):
        dumps(EncodingsFile(quantizer_args={"when": object()}))
    with pytest.raises(EncodingError, match="what JSON can't"):
        dumps(EncodingsFile(quantizer_args={"x": float("nan")}))


def test_unknown_version_to_write():
    with pytest.raises(EncodingError, match=r"unknown encodings version '9\.9\.9'; known: 0\.6\.1"):
        dumps(EncodingsFile(), "9.9.9")
