"""SIGTERM ends a command as Ctrl-C does, whenever it comes: one line, exit status 143."""

from __future__ import annotations

import subprocess
import sys

import pytest

ON_IMPORT = """
import ctypes, os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "bitwright.cli.app":
            {remember}
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
from bitwright.cli import main
sys.exit(main(["targets"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
@pytest.mark.parametrize(
    "remember",
    ["pass", "os.dup2(os.open(os.devnull, 1), 2); ctypes.pythonapi.PyRun_SimpleString(b'raise KeyboardInterrupt')"],
    ids=["while importing", "after an interrupt in a C extension's code"],
)
def test_while_modules_are_imported(remember, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ON_IMPORT.format(remember=remember))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    if remember == "pass":
        assert done.stderr == "bitwright: stopped; nothing is kept that the same command could go on from\n"
