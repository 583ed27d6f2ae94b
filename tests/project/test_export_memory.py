"""The export of a network takes at most three times its size of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "export_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="private memory is read from /proc")
@pytest.mark.parametrize("framework", ["keras", "tensorflow", "torch"])
def test_an_export_takes_at_most_three_times_the_model(framework: str) -> None:
    pytest.importorskip(framework)
    # Few large layers, which take less time than many; the process's own may differ by some megabytes, of 96.
    command = [sys.executable, str(SCRIPT), "--framework", framework, "--layers", "6", "--width", "2048"]
    done = subprocess.run([*command, "--limit", "3"], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
