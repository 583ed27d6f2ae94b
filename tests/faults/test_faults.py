"""Commands that are killed, or whose writes fail, at a few of the calls that change files; `make faults` takes all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLAN = Path(__file__).with_name("plan.py")
SAMPLED = {"quantize": 40, "quantize, over an older export": 35, "auto": 60, "analyze": 130, "collect": 23,
           "quantize, Keras": 130, "quantize, TensorFlow": 110}  # fmt: skip


pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="the calls are watched by a library that is preloaded, which takes Linux and a C compiler",
)


@pytest.mark.parametrize("name", SAMPLED)
def test_nothing_is_lost_or_left(name):
    pytest.importorskip("onnxruntime")
    if name.endswith(("Keras", "TensorFlow")):
        pytest.importorskip("keras")
        pytest.importorskip("tensorflow")
    elif name != "quantize":
        pytest.importorskip("scipy")
        pytest.importorskip("bokeh")
    ran = subprocess.run(
        [sys.executable, PLAN, name, "--every", str(SAMPLED[name])], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "| 0 of 0 |" not in ran.stdout


def test_processes_of_their_own_say_the_same_as_forks(tmp_path):
    pytest.importorskip("onnxruntime")
    words = [sys.executable, str(PLAN), "collect", "--every", "40", "--kinds", "killed", "EIO"]
    forked = subprocess.run(words, capture_output=True, text=True, check=True)
    started = subprocess.run([*words, "--started"], capture_output=True, text=True, check=True)
    assert started.stdout == forked.stdout
    assert "of 0" not in forked.stdout


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    pytest.importorskip("onnxruntime")
    kept = tmp_path / "tries.jsonl"
    words = [sys.executable, str(PLAN), "collect", "--every", "15", "--kinds", "killed", "--resume", str(kept)]
    first = subprocess.run([*words, "--share", "1/2"], capture_output=True, text=True, check=False)
    assert first.returncode == 3, first.stderr
    assert "(2 left)" in first.stdout
    assert len(kept.read_text().splitlines()) == 3
    second = subprocess.run(words, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "| 5 of 5 |" in second.stdout
    assert len(kept.read_text().splitlines()) == 5
