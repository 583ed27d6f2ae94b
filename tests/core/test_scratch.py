"""Scratch folders: those of dead processes go, all others stay, and no fork or thread takes another's away."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from bitwright.data import CutCache
from bitwright.errors import WriteError
from bitwright.files import Scratch, scratch_file, staging, sweep, sweep_scratch, temporaries_in
from bitwright.files import _scratch as module

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="nothing is locked or swept there")
OWNER = """
import sys
from bitwright.files import Scratch
scratch = Scratch()
(scratch.path / "file").write_text("x")
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(module, "_swept", set())
    return folder


def _owner() -> tuple[subprocess.Popen[str], Path]:
    """A process that has a scratch folder, until it is killed or its input ends."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, Path(process.stdout.readline().strip())


def _killed() -> Path:
    process, path = _owner()
    with process:
        process.kill()
    return path


@POSIX
def test_the_next_scratch_sweeps_what_a_killed_process_left_and_nothing_of_the_living(temporary):
    process, alive = _owner()
    dead = _killed()
    assert dead.is_dir() and alive.is_dir()
    with process:
        with Scratch() as mine:
            assert sorted(temporary.iterdir()) == sorted([alive, mine])
            assert (alive / "file").exists()
        assert list(temporary.iterdir()) == [alive]
        process.stdin.close()
    assert not list(temporary.iterdir())


@POSIX
def test_a_run_sweeps_them_whether_it_has_a_scratch_or_not(tmp_path, temporary):
    from bitwright.runs import run_in

    _killed()
    with run_in(tmp_path / "out"):
        assert not list(temporary.iterdir())


@POSIX
def test_only_what_was_made_here_goes(tmp_path, temporary, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    ours = f"bitwright-{module._host()}-1-"
    (temporary / f"{ours}linked").symlink_to(outside)
    (temporary / f"{ours}file").write_text("x")
    for name in ("bitwright-abc", f"{ours}ABC", f"x{ours}abc", "bitwright-00000000-1-abc", f".{ours}abc"):
        (temporary / name).mkdir()
    before = sorted(temporary.iterdir())
    assert not sweep_scratch()
    assert sorted(temporary.iterdir()) == before

    left = temporary / f"{ours}left"
    left.mkdir()
    (left / "link").symlink_to(outside)
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert not sweep_scratch()  # another user's
    assert sweep_scratch() == [left]
    assert (outside / "file").exists() and sorted(temporary.iterdir()) == before


@POSIX
def test_threads_and_forks_leave_each_other_s_alone(temporary):
    scratch = Scratch()
    (scratch.path / "file").write_text("x")
    found: list[Path] = []
    thread = threading.Thread(target=lambda: found.extend(sweep_scratch()))
    thread.start()
    thread.join()
    process = os.fork()
    if process == 0:
        with suppress(BaseException):
            sweep_scratch()
            with Scratch():
                pass
            scratch.close()
        os._exit(0)
    os.waitpid(process, 0)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found += pool.submit(sweep_scratch).result()
    assert not found and (scratch.path / "file").exists()
    assert not sweep_scratch()  # the fork's end didn't let go of the lock
    scratch.close()
    assert not list(temporary.iterdir())


@POSIX
def test_a_fork_keeps_the_folder_that_it_may_use(temporary):
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:
        with suppress(BaseException):
            scratch = Scratch()
            if os.fork() == 0:
                os.close(writing)
                os.read(reading, 1)  # until the test closes its end
            assert scratch.path.exists()
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    os.waitpid(owner, 0)
    (left,) = temporary.iterdir()
    assert not sweep_scratch() and left.exists()
    os.close(writing)
    os.close(reading)
    end = time.monotonic() + 30
    while left.exists() and time.monotonic() < end:
        sweep_scratch()
        time.sleep(0.01)
    assert not left.exists()


@POSIX
def test_one_that_is_swept_before_it_is_locked_is_made_anew(temporary, monkeypatch):
    hold, swept = module.hold, []

    def late(folder):
        if not swept:
            swept.append(folder)
            folder.rmdir()  # as a sweep does that finds it without a lock
        return hold(folder)

    monkeypatch.setattr(module, "hold", late)
    with Scratch() as folder:
        assert folder.is_dir() and folder not in swept
    assert not list(temporary.iterdir())


@POSIX
def test_without_locks_folders_work_and_are_never_swept(temporary, monkeypatch):
    import fcntl

    dead = _killed()
    monkeypatch.setattr(fcntl, "flock", _fails(errno.ENOLCK))
    with Scratch() as folder:
        assert not sweep_scratch() and folder.is_dir()
    assert list(temporary.iterdir()) == [dead]


def _fails(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_what_can_t_be_made_or_written_is_said(temporary, monkeypatch):
    with CutCache(0) as cache:
        monkeypatch.setattr(np, "save", _fails(errno.ENOSPC))
        with pytest.raises(WriteError, match=r"can't write .*0-0\.npy.*No space.*free some space"):
            cache.append({"x": np.zeros(4)})
    assert not list(temporary.iterdir())
    monkeypatch.setattr(tempfile, "mkdtemp", _fails(errno.ENOSPC))
    with pytest.raises(WriteError, match=f"can't write {str(temporary)!r}"):
        Scratch()


def test_nothing_is_tried_in_the_folder_for_temporary_files(temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", _fails(errno.EIO))  # writes a file there, which a kill would leave
    with Scratch() as folder:
        assert folder.parent == temporary
    with scratch_file() as file:
        file.write(b"x")
        assert not list(temporary.iterdir()) or sys.platform != "linux"


@POSIX
def test_a_folder_beside_results_stays_while_it_is_locked_whatever_process_its_name_says(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    monkeypatch.setattr(os, "getpid", lambda: gone.pid)  # as a process of another container is seen here
    with staging(tmp_path) as folder:
        assert str(gone.pid) in folder.name
        assert not sweep(tmp_path) and folder.is_dir()


def test_what_a_library_makes_lies_where_it_is_told_and_that_of_other_threads_does_not(tmp_path, temporary):
    place = tmp_path / "place"
    place.mkdir()
    made: list[Path] = []

    def make(*_):
        made.append(Path(tempfile.mkdtemp()))
        with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as file:
            made.extend([Path(folder), Path(file.name)])

    with temporaries_in(place):
        make()
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        assert Path(tempfile.mkdtemp(None, None, str(temporary))).parent == temporary
    make()
    assert [p.parent for p in made] == [place] * 3 + [temporary] * 6


def test_nobody_makes_temporary_files_otherwise():
    root = Path(__file__).parents[2]
    odd = [
        str(path.relative_to(root))
        for part in ("core", "backends", "plugins")
        for path in (root / part).rglob("*.py")
        if "core/bitwright/files" not in path.as_posix()
        and re.search(r"^\s*(import|from) tempfile\b", path.read_text(), re.MULTILINE)
    ]
    assert odd == ["core/bitwright/bank/_shares.py"]  # a folder that lies in a folder of the bank's, which is swept
