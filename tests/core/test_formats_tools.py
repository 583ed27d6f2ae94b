"""write, convert, diff and check, as the command line uses them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats_cnn import ACTIVATION_SPECS, GEOMETRIES, PARAMETER_SPECS, cnn_encodings, cnn_file

from bitwright.errors import EncodingError, InputError
from bitwright.formats import (
    VERSIONS,
    EncodingsFile,
    ExpectedEntry,
    check,
    convert,
    diff,
    dumps,
    loads,
    read,
    unbind,
    write,
)
from bitwright.grids import Blockwise, Encoding, PerChannel, QuantSpec, encoding_of_weights


def without(file, name):
    return replace(file, parameters={n: e for n, e in file.parameters.items() if n != name},
                   activations={n: e for n, e in file.activations.items() if n != name})  # fmt: skip


def changed(file, name, **changes):
    return replace(file, parameters={**file.parameters, name: file.parameters[name].with_(**changes)})


# --- write


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_file(fault, tmp_path, monkeypatch):
    path = write(cnn_file(), tmp_path / "m.encodings")
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail) if fault == "fsync" else monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write(EncodingsFile(), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.encodings"]


def test_an_entry_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = write(cnn_file(), tmp_path / "m.encodings")
    before = path.read_bytes()
    fp8 = Encoding(8, True, True, np.float32(1), np.int32(0), float_format="float8e5m2")
    with pytest.raises(EncodingError, match="float8e5m2"):
        write(EncodingsFile({"x": unbind(fp8)}), path)
    assert path.read_bytes() == before


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="No such file or directory"):
        write(cnn_file(), tmp_path / "none" / "m.encodings")


def test_writing_is_deterministic_and_takes_the_files_own_version(tmp_path):
    file = convert(cnn_file(), "2.1.0").file
    assert read(write(file, tmp_path / "a")).version == "2.1.0"
    assert dumps(file) == dumps(convert(cnn_file(), "2.1.0").file)


def test_names_of_any_kind_survive():
    entry = cnn_file().activations["input"]
    names = ["/layer.0/Conv_output_0", 'quo"te', "größe", "x:0", "a b", "version", "名"]
    for version in VERSIONS:
        assert list(loads(dumps(EncodingsFile(dict.fromkeys(names, entry)), version)).entries) == names


def test_a_large_file_is_read_and_written_in_a_moment(tmp_path):
    weight = np.random.default_rng(0).normal(size=(512, 4096)).astype(np.float32)
    encoding = encoding_of_weights(weight, QuantSpec(4, granularity=Blockwise(0, 1, 32, 8)))
    file = EncodingsFile(parameters={f"w{i}": unbind(encoding, weight.shape) for i in range(4)})
    for version in VERSIONS[1:]:
        assert diff(file, read(write(file, tmp_path / "m", version))) == []


# --- convert


def test_warnings_name_what_readers_of_the_new_schema_miss():
    assert convert(cnn_file(), "1.0.0").warnings == ()
    assert convert(cnn_file(), "0.6.1").warnings == (
        "tensor 'fc.weight': its two-level (LPBQ) scales become plain block scales",
    )
    for version in ("2.0.0", "2.1.0"):
        assert convert(cnn_file(), version).warnings == (
            "tensor 'strict.weight': its grid gets the lowest code back: 2.x can't drop it",
            "tensor 'half.weight': it has no entry any more: 2.x leaves float16 tensors out",
        )


def test_lpbq_to_other_widths_needs_1_0_0():
    weight = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    encoding = encoding_of_weights(weight, QuantSpec(3, granularity=Blockwise(0, 1, 2, 8)))
    file = EncodingsFile(parameters={"w": unbind(encoding, weight.shape)})
    assert loads(dumps(file, "1.0.0")).parameters["w"].equals(file.parameters["w"].with_(signed=None))
    with pytest.raises(EncodingError, match=r"'w': in schema 2\.0\.0 LPBQ decompresses to twice"):
        convert(file, "2.0.0")


def test_conversion_leaves_the_original_alone():
    file = cnn_file()
    before = dumps(file)
    for version in VERSIONS:
        convert(file, version, GEOMETRIES)
    assert dumps(file) == before


def test_every_entry_that_does_not_fit_its_tensor_is_found():
    geometries = {**GEOMETRIES, "conv.weight": replace(GEOMETRIES["conv.weight"], shape=(5, 3, 3, 3))}
    with pytest.raises(EncodingError, match=r"'conv\.weight': 4 scales for 5 channels \(axis 0 of \(5, 3, 3, 3\)\)"):
        convert(cnn_file(), "2.0.0", geometries)


# --- diff


@pytest.mark.parametrize("a", VERSIONS)
@pytest.mark.parametrize("b", VERSIONS)
def test_the_same_encodings_in_two_schemas_do_not_differ(a, b):
    first, second = (loads(dumps(convert(cnn_file(), v).file)) for v in (a, b))
    found = diff(first, second)
    if {a, b} & {"0.6.1"} and a != b:
        assert [(d.name, d.field) for d in found] in ([], [("fc.weight", "decompressed_bits")])
    else:
        assert found == []


def test_differences():
    a = cnn_file()
    scale = a.parameters["conv.weight"].scale.copy()
    scale[2] *= 1.01
    b = without(changed(a, "conv.weight", scale=scale), "relu")
    b = replace(b, activations={**b.activations, "input": b.activations["input"].with_(zero_point=np.array(86)),
                                "new": b.activations["tanh"]})  # fmt: skip
    b = changed(b, "strict.weight", strict=False)
    found = {(d.name, d.field): d for d in diff(a, b)}
    assert set(found) == {
        ("input", "zero_point"), ("relu", "missing"), ("conv.weight", "scale"), ("strict.weight", "strict"),
        ("new", "missing"),
    }  # fmt: skip
    worst = found["conv.weight", "scale"]
    assert worst.relative == pytest.approx(0.01 / 1.01, rel=1e-4)
    assert worst.places == 1
    assert str(found["relu", "missing"]) == "relu: only in the first file"
    assert str(found["new", "missing"]) == "new: only in the second file"
    assert str(found["input", "zero_point"]) == "input: zero_point 85 against 86 (1 differ)"
    assert str(worst).startswith("conv.weight: scale 0.000956913")
    assert ("conv.weight", "scale") not in {(d.name, d.field) for d in diff(a, b, tolerance=0.01)}


def test_other_kinds_of_difference():
    a = cnn_file()
    moved = replace(without(a, "conv.bias"), activations={**a.activations, "conv.bias": a.parameters["conv.bias"]})
    assert [(d.name, d.field) for d in diff(a, moved)] == [("conv.bias", "kind")]
    fewer = replace(a, parameters={**a.parameters, "conv.weight": a.parameters["strict.weight"]})
    assert ("conv.weight", "count") in {(d.name, d.field) for d in diff(a, fewer)}
    half = replace(a, parameters={**a.parameters, "conv.weight": a.parameters["half.weight"]})
    assert {d.field for d in diff(a, half)} == {"bits", "float_format"}
    axis = changed(a, "gemm.weight", axis=0)
    assert [(d.name, d.field) for d in diff(a, axis)] == [("gemm.weight", "axis")]


def test_blocks_of_schemas_that_list_them_differently_are_compared_in_place():
    weight = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    encoding = encoding_of_weights(weight, QuantSpec(4, granularity=Blockwise(0, 1, 2)))
    stored = encoding.with_(granularity=Blockwise(1, 0, 2))  # stored (in, out)
    file = EncodingsFile(parameters={"w": unbind(stored, (6, 2))})
    for version in VERSIONS:
        text = dumps(file, version).replace('"bitwright"', '"other"')  # a foreign file, without our notes
        assert diff(file, loads(text)) == []


# --- check


def expected():
    table = {n: ExpectedEntry.of(s, "activation") for n, s in ACTIVATION_SPECS.items()}
    for name, spec in PARAMETER_SPECS.items():
        shape = GEOMETRIES[name].shape
        table[name] = ExpectedEntry.of(spec, "parameter", shape[::-1] if name == "gemm.weight" else shape)
    table["conv.bias"] = ExpectedEntry("parameter", 32, True, True, (4,), optional=True)
    table["half.weight"] = ExpectedEntry.of(QuantSpec(16, float_format="float16"), "parameter", (2, 2))
    return table


TENSORS = {*cnn_encodings(), "logits"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_right_file_has_no_problem(version):
    assert check(loads(dumps(cnn_file(), version)), expected(), TENSORS) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_foreign_file_has_none_either(version):
    text = dumps(cnn_file(), version).replace('"bitwright": {', '"other": {')
    assert check(loads(text), expected(), TENSORS) == []


def test_optional_entries_may_be_missing():
    assert check(without(cnn_file(), "conv.bias"), expected(), TENSORS) == []


def test_float16_must_be_present_in_1_0_0():
    assert [str(p) for p in check(without(cnn_file(), "half.weight"), expected(), TENSORS)] == [
        "half.weight: has no entry"
    ]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: without(f, "relu"), "relu: has no entry"),
        (lambda f: replace(f, activations={**f.activations, "ghost": f.activations["relu"]}),
         "ghost: has an entry, but the artefact has no tensor of that name"),
        (lambda f: replace(f, activations={**f.activations, "logits": f.activations["relu"]}),
         "logits: has an entry, but isn't to be quantized"),
        (lambda f: changed(f, "conv.weight", bits=4, zero_point=np.full(4, 8)), "conv.weight: 4 bits, expected 8"),
        (lambda f: changed(f, "conv.weight", signed=False), "conv.weight: unsigned codes, expected signed"),
        (lambda f: changed(f, "conv.weight", symmetric=False),
         "conv.weight: an asymmetric grid, expected the other kind"),
        (lambda f: changed(f, "conv.weight", symmetric=None, zero_point=np.array([128, 128, 127, 128])),
         "conv.weight: a zero point off the middle, expected a symmetric grid"),
        (lambda f: changed(f, "conv.weight", zero_point=np.array([128, 128, 127, 128])),
         "conv.weight: is said to be symmetric, but its zero point is off the middle"),
        (lambda f: changed(f, "strict.weight", strict=False), "strict.weight: a lowest code, expected none"),
        (lambda f: changed(f, "conv.weight", scale=np.ones(3), zero_point=np.full(3, 128)),
         "conv.weight: 3 scales, expected 4 channels"),
        (lambda f: changed(f, "block.weight", scale=np.ones((1, 4)), zero_point=np.full((1, 4), 8)),
         "block.weight: scales for 1 channels, expected 2"),
        (lambda f: changed(f, "fc.weight", block_scale=np.ones((2, 2))),
         "fc.weight: 4 scales, expected 8 (2 channels of 4 blocks)"),
        (lambda f: replace(f, parameters={**f.parameters, "half.weight": f.parameters["strict.weight"]}),
         "half.weight: integer encoding, expected float16"),
        (lambda f: replace(without(f, "relu"), parameters={**f.parameters, "relu": f.activations["relu"]}),
         "relu: is listed as parameter, but is an activation"),
    ],
)  # fmt: skip
def test_problem(damage, problem):
    assert [str(p) for p in check(damage(cnn_file()), expected(), TENSORS)] == [problem]


def test_a_tensor_to_quantize_that_the_artefact_lacks():
    problems = check(cnn_file(), expected(), TENSORS - {"relu"})
    assert [str(p) for p in problems] == [
        "relu: is to be quantized, but the artefact has no tensor of that name",
        "relu: has an entry, but the artefact has no tensor of that name",
    ]


def test_expectations_of_specs():
    entry = ExpectedEntry.of(QuantSpec(4, granularity=PerChannel(1)), "parameter", (3, 5))
    assert (entry.bits, entry.signed, entry.scale_shape, entry.optional) == (4, True, (5,), False)
    assert ExpectedEntry.of(QuantSpec(8, unsigned_symmetric=True), "activation").signed is None
