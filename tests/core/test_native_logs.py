"""What frameworks log while they are imported stays out of the output; what else they say doesn't."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, sys
from bitwright.backend import without_native_logs

def native(*lines):
    os.write(2, "".join(line + "\\n" for line in lines).encode())

with without_native_logs({package!r}):
    native("WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
           "I0000 00:00:1795949741.619799   16505 port.cc:153] oneDNN custom operations are on.",
           "2026-01-02 03:04:05.678901: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.",
           "To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow.",
           "E0000 00:00:1795949741.619799   16505 cuda_executor.cc:1228] failed call to cuInit",
           "Illegal instruction")
    print("a warning of Python's", file=sys.stderr)
    if len(sys.argv) > 1:
        native("F0000 00:00:1795949741.619799   16505 check.cc:1] this library can't run here")
        os.abort()
native("I0000 00:00:1795949741.619799   16505 late.cc:1] no import goes on")
"""


def said(package: str = "not_imported", *words: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM.format(package=package), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()


def test_only_logs_of_what_is_well_are_held_back():
    errors = said()
    assert [line.split()[0] for line in errors] == ["E0000", "Illegal", "a", "I0000"]
    assert errors[-1].endswith("no import goes on")


def test_the_last_words_of_a_library_that_aborts_are_heard():
    assert any("this library can't run here" in line for line in said("not_imported", "abort"))


def test_nothing_is_done_where_the_package_is_loaded():
    assert len(said("os")) == 8
