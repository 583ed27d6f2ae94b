"""What killed processes leave is swept by the next run; what the living write stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.errors import WriteError
from bitwright.files import sweep, written_beside
from bitwright.runs import run_in


def _gone() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is swept there")
def test_only_the_files_of_dead_processes_go(tmp_path):
    dead, alive = _gone(), os.getpid()
    gone = [f".report.html.{dead}.tmp", f".m.onnx.{dead}.old", f".{dead}.probe", f".run/steps/a/.x.npz.{dead}.tmp"]
    stay = ["model.onnx", f".report.html.{alive}.tmp", ".hidden", ".env.tmp", f"report.{dead}.tmp", ".bitwright-x"]
    for name in (*gone, *stay, f".m.{dead}.partial/m.onnx", f".bitwright-{dead}-abc/m.onnx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with run_in(tmp_path):
        left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left >= set(stay)
    assert not [p for p in left if str(dead) in p and p.startswith(".")]


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is swept there")
def test_a_link_is_removed_and_not_what_it_points_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".m.{_gone()}.partial").symlink_to(tmp_path / "kept")
    assert len(sweep(tmp_path / "out")) == 1
    assert (tmp_path / "kept" / "file").exists() and not list((tmp_path / "out").iterdir())


def test_what_is_written_beside_comes_as_a_whole(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_text("old")
    with written_beside(path) as folder:
        (folder / "net.onnx.data").write_text("weights")
        (folder / "net.onnx").write_text("new")
        assert path.read_text() == "old" and [p.name for p in tmp_path.glob("net*")] == ["net.onnx"]
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"net.onnx": "new", "net.onnx.data": "weights"}
    with pytest.raises(WriteError, match=r"net\.onnx"), written_beside(path) as folder:
        (folder / "net.onnx").write_text("newer")
        raise OSError(errno.ENOSPC, "disk full")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"net.onnx": "new", "net.onnx.data": "weights"}


def test_the_file_that_points_at_others_comes_last(tmp_path, monkeypatch):
    moved, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (moved.append(self.name), replace(self, to))[1])
    with written_beside(tmp_path / "a.meta") as folder:
        for name in ("a.meta", "a.index", "z.data"):
            (folder / name).write_text(name)
    assert moved == ["a.index", "z.data", "a.meta"]


def test_a_folder_takes_another_s_place_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "saved_model"
    for text in ("first", "second"):
        with written_beside(path) as folder:
            (folder / path.name).mkdir()
            (folder / path.name / "model.pb").write_text(text)
        assert (path / "model.pb").read_text() == text
    rename = Path.rename
    fails = lambda self, to: _full() if (self.name, to) == (path.name, path) else rename(self, to)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(WriteError), written_beside(path) as folder:
        (folder / path.name).mkdir()
        (folder / path.name / "model.pb").write_text("third")
    assert (path / "model.pb").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["saved_model"]


def _full():
    raise OSError(errno.ENOSPC, "disk full")


def test_an_interrupt_between_the_two_moves_of_a_folder_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "saved"
    path.mkdir()
    (path / "a").write_text("old")
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "saved" and Path(target) == path:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), written_beside(path) as folder:
        (folder / "saved").mkdir()
    assert (path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
