"""Files that are damaged, hostile or made for other programs end in bitwright's own errors, whatever is in them."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bitwright import formats
from bitwright.data import labels
from bitwright.errors import BitwrightError, EncodingError, InputError, TargetError
from bitwright.files import open_npy, open_npz, read_npy, read_npz, write_text
from bitwright.report import read_report, read_run
from bitwright.runs._directory import FileStore
from bitwright.simulation import read_recipe
from bitwright.targets import load_target

DEEP, LONG = 100_000, "9" * 5_000


def _npy(header: str) -> bytes:
    text = header.encode("latin1").ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f4', 'fortran_order': False, 'shape': (", "{'descr': '<f4', 'shape': (2,)}", "{", "(((", "'''", "\0",
     "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", "{'descr': 4, 'fortran_order': 0, 'shape': (2,)}",
     "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999,)}", "[" * 110,
     "{'descr': '<f4', 'fortran_order': False, 'shape': 2}",
     "{'descr': '4f2', 'fortran_order': False, 'shape': (2, 4)}",  # of arrays
     "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
     "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999999)}",
     "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
     "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 65 + ")}",
     "{'descr': '|O', 'fortran_order': False, 'shape': (2,)}", "{1: 2, 'a': 3}"],
)  # fmt: skip
def test_npy_headers(tmp_path, header):
    (tmp_path / "a.npy").write_bytes(_npy(header))
    with pytest.raises(InputError, match=r"a\.npy"):
        read_npy(tmp_path / "a.npy")


def test_every_damaged_byte_of_a_compressed_npz_is_read_or_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(40, dtype=np.float32))
    whole, path = buffer.getvalue(), tmp_path / "d.npz"
    refused = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            read_npz(path)
        except InputError:
            refused += 1
    assert refused > len(whole) // 2


def test_every_damaged_byte_of_a_stored_step_counts_as_absent(tmp_path):
    store = FileStore(tmp_path)
    held = {"a": np.arange(6, dtype=np.float64)}
    store.put("key", held)
    (path,) = tmp_path.glob("*.npz")
    whole = path.read_bytes()
    absent = 0
    for position in range(len(whole)):
        for flipped in (0x01, 0xFF):  # the first also marks an entry as encrypted
            path.write_bytes(whole[:position] + bytes([whole[position] ^ flipped]) + whole[position + 1 :])
            found = store.get("key")
            absent += found is None
            assert found is None or np.array_equal(found["a"], held["a"])
    assert absent > len(whole)


def test_labels_that_are_no_numbers(tmp_path):
    for name, values in {"text": np.array(["a", "b"]), "records": np.zeros(2, [("a", "f4")]),
                         "dates": np.array(["2026-01-01"], "M8[D]"), "unsigned": np.array([2**63], np.uint64),
                         "large": np.array([1e30]), "infinite": np.array([np.inf])}.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", values)
        with pytest.raises(InputError, match="class indices"):
            labels(tmp_path / f"{name}.npy")
    np.save(tmp_path / "halves.npy", np.float16([3, 1000]))
    assert labels(tmp_path / "halves.npy").tolist() == [3, 1000]
    (tmp_path / "l.txt").write_text("9" * 30)
    with pytest.raises(InputError, match="integer a line"):
        labels(tmp_path / "l.txt")


@pytest.mark.parametrize(
    "text",
    ["[" * DEEP, '{"a":' * DEEP, f'{{"defaults": {LONG}}}', '{"bitwright": {"extends": "' + "x" * 5000 + '"}}',
     '{"bitwright": {"extends": "a\\u0000b"}}'],
    ids=["lists", "objects", "a long number", "a long name", "NUL in a name"],
)  # fmt: skip
def test_target_files(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(TargetError):
        load_target(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [("r.json", "[" * DEEP), ("r.json", f"[{LONG}]"), ("r.yaml", f"[{LONG}]"),
     ("r.yaml", "[{adaround: {a: 2026-99-99}}]"),
     ("r.yaml", "[" * 3_000), ("r.yaml", f"- adaround: {{iterations: 0x{'f' * 20_000}}}"),
     ("r.yaml", f"- adaround: {{iterations: {'59:' * 5_000}1}}"), ("r.yaml", "- " + "a" * 2_000_000),
     ("r.yaml", "".join(["m0: &m0 {a: 1}\n", *(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}, *m{i - 1}]}}\n"
                                                for i in range(1, 25))])),
     ("r.yaml", f"- adaround: {{iterations: {'59:' * 100_000}1}}"),
     ("r.yaml", f"- adaround: {{damping: {'59:' * 100_000}1.5}}"), ("r.yaml", "- adaround: &a {include: *a}"),
     ("r.yaml", f"[{','.join('1' * 20_000)}]")],
)  # fmt: skip
def test_recipe_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    started = time.process_time()
    with pytest.raises(InputError) as refused:
        read_recipe(tmp_path / name)
    assert time.process_time() - started < 2
    assert len(str(refused.value)) < 1_000


def test_aliases_of_a_few_entries_are_as_good_as_any(tmp_path):
    text = "- cle: &s {}\n- activation_ranges: {<<: *s, include: &n ['a'], exclude: *n}\n"
    (tmp_path / "r.yaml").write_text(text)
    steps = read_recipe(tmp_path / "r.yaml").steps
    assert steps[1].settings == {"include": ["a"], "exclude": ["a"]}


def test_a_compressed_npz_that_unpacks_to_far_more_is_refused(tmp_path):
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("x.npy", "z.npy"):
            with archive.open(name, "w") as member:
                np.lib.format.write_array_header_1_0(
                    member, {"descr": "<f4", "fortran_order": False, "shape": (20 * 2**20,)}
                )
                for _ in range(80):
                    member.write(b"\0" * 2**20)
    with pytest.raises(InputError, match=r"unpack to 160 MiB; write it by numpy\.savez"):
        open_npz(path)


def _archive(path, entries):
    """A zip file whose directory lists one local entry so many times, under several names."""
    buffer = io.BytesIO()
    content = io.BytesIO()
    np.save(content, np.asfortranarray(np.zeros((1000, 4), np.float32)))
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x0000.npy", content.getvalue())
    raw = buffer.getvalue()
    start, end = raw.rindex(b"PK\x01\x02"), raw.rindex(b"PK\x05\x06")
    listed = b"".join(raw[start:end].replace(b"x0000", f"x{i:04d}".encode()) for i in range(entries))
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, entries, entries, len(listed), start, 0)
    path.write_bytes(raw[:start] + listed + tail)


def test_arrays_that_lie_in_one_place_are_refused(tmp_path):
    """In Fortran order each is read at once: 2,000 of a megabyte that is stored once are two gigabytes."""
    _archive(tmp_path / "one.npz", 1)
    assert read_npz(tmp_path / "one.npz")["x0000"].shape == (1000, 4)
    _archive(tmp_path / "d.npz", 2000)
    with pytest.raises(InputError, match="overlap"):
        open_npz(tmp_path / "d.npz")


@pytest.mark.parametrize("shape", ["(4294967296, 4294967296, 4)", "(9223372036854775807, 3)", f"({'1, ' * 100})"])
def test_shapes_that_no_array_can_have(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(_npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"))
    with pytest.raises(InputError, match=r"truncated|100 axes"):
        open_npy(tmp_path / "a.npy")


def test_a_packed_step_counts_as_absent(tmp_path):
    """A store's files are never compressed, and could unpack to gigabytes."""
    store = FileStore(tmp_path)
    store.put("key", {"a": np.zeros(2**18)})
    (path,) = tmp_path.glob("*.npz")
    assert store.get("key") is not None
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert store.get("key") is None


def test_files_that_extend_each_other_without_end(tmp_path):
    for i in range(1000):
        (tmp_path / f"{i}.json").write_text(json.dumps({"bitwright": {"extends": f"{i + 1}.json"}}))
    with pytest.raises(TargetError, match="more than 20 files"):
        load_target(tmp_path / "0.json")


def test_long_values_are_told_in_short(tmp_path):
    raw = json.loads(load_target("generic-int8").to_json())
    (tmp_path / "t.json").write_text(json.dumps({**raw, "defaults": "x" * 1_000_000}))
    with pytest.raises(TargetError) as refused:
        load_target(tmp_path / "t.json")
    assert len(str(refused.value)) < 1_000


def test_a_key_that_comes_twice_is_found_soon(tmp_path):
    keys = ",".join(f'"a{i}":0' for i in range(30_000))
    (tmp_path / "e.encodings").write_text(f'{{{keys},"a29999":0}}')
    started = time.process_time()
    with pytest.raises(EncodingError, match="'a29999' comes twice"):
        formats.read(tmp_path / "e.encodings")
    assert time.process_time() - started < 2


def _encodings(**changes):
    entry = {"bw": 8, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False, "offset": [-128], "scale": [0.1]}
    return {"version": "1.0.0", "activation_encodings": [{"name": "x", **entry, **changes}], "param_encodings": []}


@pytest.mark.parametrize("change", [{"bw": 10**400}, {"offset": [10**400]}, {"scale": [10**400]}, {"bw": 1e400}])
def test_numbers_beyond_floats_in_encodings(tmp_path, change):
    path = tmp_path / "e.encodings"
    path.write_text(json.dumps(_encodings(**change)))
    with pytest.raises(EncodingError):
        formats.read(path)


@pytest.mark.parametrize("text", ["[" * DEEP, f'{{"version": {LONG}}}'], ids=["deep", "long"])
def test_encodings_files(tmp_path, text):
    (tmp_path / "e.encodings").write_text(text)
    with pytest.raises(BitwrightError):
        formats.read(tmp_path / "e.encodings")


def test_half_a_character_in_a_name_is_refused_where_it_can_not_be_written(tmp_path):
    path = tmp_path / "e.encodings"
    path.write_text(json.dumps(_encodings(name="a\ud800")))
    with pytest.raises(InputError, match="lone surrogate"):
        write_text(tmp_path / "out", json.dumps(json.loads(path.read_text()), ensure_ascii=False))
    assert [p.name for p in tmp_path.iterdir()] == ["e.encodings"]
    with pytest.raises(BitwrightError, match="lone surrogate"):
        formats.write(formats.read(path), tmp_path / "out.encodings", "1.0.0")


def test_zip_entries_that_claim_to_be_encrypted(tmp_path):
    path: Path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x.npy", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02") + 8
    raw[at] |= 1
    raw[6] |= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="encrypted"):
        read_npz(path)


@pytest.mark.parametrize("text", ["[" * DEEP, f'{{"name": {LONG}}}', '{"name": "m"}'], ids=["deep", "long", "short"])
def test_reports(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    found = read_report(tmp_path, "m")
    assert found.report is None and "report.json: it can't be read" in found.damage
    with pytest.raises(InputError, match="no report of a run"):
        read_run(tmp_path)
