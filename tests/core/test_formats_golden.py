"""Golden files of a small CNN in all schemas; to renew them on purpose, run this module as a script."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from formats_cnn import GEOMETRIES, LPBQ_WEIGHT, cnn_encodings, cnn_file

from bitwright.formats import VERSIONS, bind, convert, dumps, loads, read, write

GOLDEN = Path(__file__).parent / "formats_golden"


def golden(version: str) -> str:
    return (GOLDEN / f"cnn_{version}.encodings").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", VERSIONS)
def test_file_is_the_golden_one(version):
    assert dumps(cnn_file(), version) == golden(version)


@pytest.mark.parametrize("version", VERSIONS)
def test_load_and_save_give_the_same_bytes(version, tmp_path):
    path = write(loads(golden(version)), tmp_path / "again.encodings")
    assert path.read_text(encoding="utf-8") == golden(version)


@pytest.mark.parametrize("version", VERSIONS)
def test_loaded_encodings_are_the_written_ones(version):
    file = read(GOLDEN / f"cnn_{version}.encodings")
    wanted = cnn_encodings()
    assert set(file.entries) == set(wanted)
    assert set(file.parameters) == set(GEOMETRIES)
    for name, encoding in wanted.items():
        got = bind(file.entries[name], GEOMETRIES.get(name))
        if name == "fc.weight" and version == "0.6.1":  # two-level scales become plain block scales
            assert np.array_equal(got.scale, encoding.scale)
            assert got.block_scale is None
        else:
            assert got.equals(encoding), name
    assert file.quantizer_args == cnn_file().quantizer_args
    assert file.excluded_layers == ("head",)
    assert file.provenance == cnn_file().provenance


@pytest.mark.parametrize("version", VERSIONS)
def test_own_files_need_no_geometry(version):
    file = loads(golden(version))
    for name, encoding in cnn_encodings().items():
        if not (name == "fc.weight" and version == "0.6.1"):
            assert bind(file.entries[name]).equals(encoding), name


@pytest.mark.parametrize("source", VERSIONS)
@pytest.mark.parametrize("target", VERSIONS)
def test_conversion_gives_the_golden_file_of_the_other_schema(source, target):
    file = loads(golden(source))
    converted = convert(file, target).file
    if source == "0.6.1" and target != "0.6.1":  # LPBQ can't come back
        lossy = json.loads(dumps(converted))
        exact = json.loads(golden(target))
        for document in (lossy, exact):
            for section in ("param_encodings", "encodings"):
                document[section] = [e for e in document.get(section, []) if e["name"] != "fc.weight"]
            document["producer"]["bitwright"]["tensors"].pop("fc.weight", None)
        assert lossy == exact
    else:
        assert dumps(converted) == golden(target)


def test_float16_is_present_where_the_schema_has_it_and_left_out_elsewhere():
    assert json.loads(golden("0.6.1"))["param_encodings"]["half.weight"] == [{"bitwidth": 16, "dtype": "float"}]
    entries = {e["name"]: e for e in json.loads(golden("1.0.0"))["param_encodings"]}
    assert entries["half.weight"] == {"name": "half.weight", "dtype": "FLOAT", "bw": 16, "enc_type": "PER_TENSOR"}
    for version in ("2.0.0", "2.1.0"):
        assert "half.weight" not in {e["name"] for e in json.loads(golden(version))["encodings"]}


def test_lpbq_numbers_are_the_verified_ones():
    entry = {e["name"]: e for e in json.loads(golden("1.0.0"))["param_encodings"]}["fc.weight"]
    assert entry["scale"] == [0.03125, 0.0625]
    assert entry["per_block_int_scale"] == [8, 16, 2, 1, 16, 2, 5, 6]
    assert (entry["bw"], entry["compressed_bw"], entry["block_size"], entry["offset"]) == (8, 4, 2, [-128, -128])
    row0, row1 = bind(loads(golden("2.1.0")).entries["fc.weight"]).fake_quantize(LPBQ_WEIGHT)
    assert row0.tolist() == [1, -2, 3, -4, 0.4375, 0.25, -0.125, 0.0625]
    assert row1.tolist() == [7, -7, 0.875, 0.875, 1.875, 1.875, -3, -1.125]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for v in VERSIONS:
        write(cnn_file(), GOLDEN / f"cnn_{v}.encodings", v)
