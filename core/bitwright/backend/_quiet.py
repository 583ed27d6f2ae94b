"""Silences what a framework says about itself while it works for us."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NOISE = (
    rb"[IW]\d{4} [\d.:]+ +\d+ [\w./-]+:\d+\] ",  # absl: I0000 00:00:1732900000.123456 1234 port.cc:153] …
    rb"\d{4}-\d\d-\d\d [\d:.]+: [IW] ",  # TensorFlow's own
    rb"WARNING: All log messages before absl::InitializeLog\(\)",
    rb"To enable the following instructions: ",  # the second line of such a record
)
"""Beginnings of lines of native logs that say what is no error."""
_FILTER = f"""
import re, sys
noise = re.compile({b"|".join(NOISE)!r})
for line in iter(sys.stdin.buffer.readline, b""):
    if not noise.match(line):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Without warnings, and of a framework's logger only errors.

    Args:
        name: of the logger.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def without_native_logs(package: str) -> Iterator[None]:
    """Without what native code logs on the error stream, past Python, though nothing is wrong, while it is imported.

    All else that is written there passes, through a process of its own: the last words of a library that aborts too.

    Args:
        package: that is going to be imported; where it is already, nothing is done.
    """
    if package in sys.modules:
        yield
        return
    try:
        stream = os.dup(2)
        if not sys.executable or getattr(sys, "frozen", False):  # of a frozen program it is the program itself
            raise OSError("there is no interpreter to run")
        filtering = subprocess.Popen([sys.executable, "-I", "-S", "-c", _FILTER], stdin=subprocess.PIPE)
    except OSError:  # no error stream, or no processes
        yield
        return
    assert filtering.stdin is not None
    _flush()
    os.dup2(filtering.stdin.fileno(), 2)
    try:
        yield
    finally:
        _flush()
        os.dup2(stream, 2)
        os.close(stream)
        filtering.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # something that was started meanwhile holds the stream
            filtering.wait(5)


def _flush() -> None:
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
