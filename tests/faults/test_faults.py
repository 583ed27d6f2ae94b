"""Commands that are killed, or whose writes fail, at a few of the calls that change files; `make faults` takes all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLAN = Path(__file__).with_name("plan.py")
SAMPLED = {"quantize": 40, "quantize, over an older export": 23, "auto": 60, "analyze": 90, "collect": 23}


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="the calls are watched by a library that is preloaded, which takes Linux and a C compiler",
)
@pytest.mark.parametrize("name", SAMPLED)
def test_nothing_is_lost_or_left(name):
    pytest.importorskip("onnxruntime")
    if name != "quantize":
        pytest.importorskip("scipy")
        pytest.importorskip("bokeh")
    ran = subprocess.run(
        [sys.executable, PLAN, name, "--every", str(SAMPLED[name])], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "| 0 of 0 |" not in ran.stdout
