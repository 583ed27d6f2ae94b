"""Run directories: what is stored survives, what is damaged is redone, and two processes don't mix."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitwright.errors import InputError, WriteError
from bitwright.files import _durable as durable
from bitwright.runs import MemoryStore, RunDirectory, versions
from bitwright.runs._directory import FileStore

ARRAYS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "file": np.array(3),
    "a/b ç": np.array("text"),
    "empty": np.zeros((0, 2), np.int64),
}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("make", [lambda path: MemoryStore(), FileStore])
def test_round_trip(tmp_path, make):
    store = make(tmp_path / "s")
    assert store.get("layer/features.0/conv") is None
    store.put("layer/features.0/conv", ARRAYS)
    assert same(store.get("layer/features.0/conv"), ARRAYS)
    store.put("layer/features.0/conv", {"w": np.ones(1)})
    assert list(store.get("layer/features.0/conv")) == ["w"]
    assert store.get("layer/features.0") is None


@settings(max_examples=25, deadline=None)
@given(
    st.text(min_size=1),
    st.dictionaries(
        st.text(), hnp.arrays(st.sampled_from([np.float32, np.int32, np.bool_]), hnp.array_shapes(min_dims=0))
    ),
)
def test_any_key_and_arrays(tmp_path_factory, key, arrays):
    store = FileStore(tmp_path_factory.mktemp("s"))
    store.put(key, arrays)
    found = store.get(key)
    assert found.keys() == arrays.keys()
    assert all(found[k].tobytes() == arrays[k].tobytes() and found[k].shape == arrays[k].shape for k in arrays)


def test_a_damaged_result_counts_as_absent(tmp_path):
    store = FileStore(tmp_path)
    store.put("k", ARRAYS)
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    for cut in range(0, len(whole), 97):
        file.write_bytes(whole[:cut])
        assert store.get("k") is None
    at = whole.index(ARRAYS["weight"].tobytes())
    file.write_bytes(whole[: at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10 :])
    assert store.get("k") is None, "a flipped bit in the numbers must be seen"
    file.write_bytes(whole)
    assert same(store.get("k"), ARRAYS)


def test_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pickle"):
        FileStore(tmp_path).put("k", {"o": np.array([{}], dtype=object)})
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_result(tmp_path, monkeypatch):
    store = FileStore(tmp_path)
    store.put("k", ARRAYS)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        store.put("k", {"w": np.ones(3)})
    assert same(store.get("k"), ARRAYS)
    assert [f.suffix for f in tmp_path.iterdir()] == [".npz"]


def test_atomic_write_keeps_the_old_file_when_the_block_raises(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), durable.atomic_write(file) as out:
        out.write(b"half")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_not_a_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="can't write"):
        RunDirectory(tmp_path / "f")
    with pytest.raises(InputError, match="can't write"):
        RunDirectory(tmp_path / "f" / "deeper")


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="you may write to"):
        RunDirectory(tmp_path / "run")


def test_steps_are_separate_and_unused_ones_go(tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        run.step("a", {"seed": 0}).put("k", ARRAYS)
        run.step("b", {"seed": 0}).put("k", {"w": np.ones(1)})
        run.finish()
    with RunDirectory(tmp_path / "run") as run:
        assert same(run.step("a", {"seed": 0}).get("k"), ARRAYS)
        assert run.step("c", {"seed": 0}).get("k") is None
        run.finish()
    with RunDirectory(tmp_path / "run") as run:
        assert run.step("b", {"seed": 0}).get("k") is None, "the second run didn't use step b"
        assert run.step("a", {"seed": 0}).get("k") is not None
        steps = [(e["name"], e["resumed"]) for e in run.events() if e["event"] == "step"]
    assert steps == [("a", False), ("b", False), ("a", True), ("c", False), ("b", False), ("a", True)]


def test_other_versions_are_another_step(tmp_path, monkeypatch):
    with RunDirectory(tmp_path) as run:
        run.step("a", {"seed": 0}).put("k", ARRAYS)
        monkeypatch.setattr("bitwright._version.__version__", "999")
        assert run.step("a", {"seed": 0}).get("k") is None


def test_what_a_step_depends_on_separates_it(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.step("a", {"seed": 0, "data": "x"}).put("k", ARRAYS)
        assert run.step("a", {"data": "x", "seed": 0}).get("k") is not None, "the order of keys means nothing"
        assert run.step("a", {"seed": 1, "data": "x"}).get("k") is None


def test_an_empty_run_can_be_discarded(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.step("a", {})
    run.discard_if_empty()
    assert not (tmp_path / "run").exists()
    run = RunDirectory(tmp_path / "run")
    run.step("a", {}).put("k", ARRAYS)
    run.discard_if_empty()
    with RunDirectory(tmp_path / "run") as run:
        assert run.step("a", {}).get("k") is not None


def test_journal_survives_a_cut_line(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.record("one", n=1)
        journal = run.journal
    journal.write_bytes(journal.read_bytes() + b'{"event": "hal')
    with RunDirectory(tmp_path) as run:
        run.record("two")
        assert [e["event"] for e in run.events()] == ["one", "two"]


def test_an_error_is_journalled(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunDirectory(tmp_path) as run:
        raise KeyboardInterrupt
    assert [e["event"] for e in run.events()] == ["interrupted"]


HOLD = """
import sys, time
import numpy as np
from bitwright.runs import RunDirectory
run = RunDirectory(sys.argv[1])
store = run.step("a", {"seed": 0})
for i in range(1000):
    store.put(f"layer/{i}", {"w": np.full((64, 64), i, np.float32)})
    print(i, flush=True)
time.sleep(60)
"""


def test_second_process_is_refused_and_kill_leaves_whole_results(tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        while child.stdout.readline().strip() != "20":
            pass
        with pytest.raises(InputError, match=rf"in use by process {child.pid}; wait"):
            RunDirectory(tmp_path / "run")
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    with RunDirectory(tmp_path / "run") as run:
        store = run.step("a", {"seed": 0})
        done = [store.get(f"layer/{i}") for i in range(1000)]
        assert all(found is not None for found in done[:21])
        assert all((found["w"] == i).all() for i, found in enumerate(done) if found is not None)


def test_lock_is_free_after_close(tmp_path):
    RunDirectory(tmp_path).close()
    begin = time.monotonic()
    RunDirectory(tmp_path).close()
    assert time.monotonic() - begin < 1


def test_versions_name_what_results_depend_on():
    assert versions().keys() == {"python", "bitwright", "results", "numpy"}
    assert versions(["pluggy", "no_such_module"]).keys() == {"python", "bitwright", "results", "numpy", "pluggy"}


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of the length of files")
def test_a_disk_on_which_the_lock_cant_be_written_is_named(tmp_path):
    import resource

    before, handled = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(WriteError, match=r"can't write '.*lock': File too large"):
            RunDirectory(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handled)
    RunDirectory(tmp_path / "run").close()
