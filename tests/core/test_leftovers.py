"""What killed processes leave is swept by the next run; what the living write stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitwright.files import sweep
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
