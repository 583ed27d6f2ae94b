"""HDF5 files are read by another process first: one over which the library crashes or never ends costs that process."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from bitwright.errors import InputError
from bitwright_keras.capture import hdf5

_SECONDS, _BYTES_A_SECOND = 20.0, 2**24
"""So long may reading a file take, and a second more for so many bytes that it holds or may unpack to."""

_GARBAGE = "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0"
"""glibc hands out memory full of garbage. Where the library frees pointers that it never set (those of a group's links,
when one can't be read), it would else depend on what memory held whether this process dies, and later the user's."""


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    """What the other process is started with. The user's settings of glibc stay, ahead of those of `_GARBAGE`: of two
    values the last is taken, and where a part has no value, newer versions take none at all."""
    tunables = [part for part in own.get("GLIBC_TUNABLES", "").split(":") if "=" in part]
    glibc = ":".join([*tunables, _GARBAGE])
    return {**own, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": glibc}


class _Reader:
    """The process that reads; it is started when it is first needed, ends with this one, and is replaced if it dies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0
        atexit.register(self.end)
        if hasattr(os, "register_at_fork"):  # another thread may hold the lock, and won't let it go in the child
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._lock = threading.Lock()

    def ask(self, path: Path, most: int, seconds: float) -> dict[str, object] | None:
        """Its answer; None when it died over the file, or took too long and was ended.

        Raises:
            InputError: no process can be started.
        """
        with self._lock:
            try:
                child = self._running()
            except OSError as error:
                raise InputError(f"{path} can't be opened: no process can be started to look at it: {error}") from error
            assert child.stdin is not None and child.stdout is not None
            timer = threading.Timer(seconds, child.kill)
            timer.start()
            try:
                child.stdin.write(json.dumps([str(path.resolve()), most]) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
                found: dict[str, object] | None = json.loads(line) if line else None
            except (OSError, ValueError):  # ValueError: something else has written there
                found = None
            except BaseException:  # an interrupt: the answer would be taken for that of the next question
                self.end()
                raise
            finally:
                timer.cancel()
            if found is None:
                self.end()
            return found

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self._child, self._owner = None, os.getpid()
            self._child = subprocess.Popen(
                [sys.executable, "-P", hdf5.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=_environment(os.environ),
                start_new_session=True,  # Ctrl-C is for this process, which ends the other
            )
        return self._child

    def end(self) -> None:
        """End the process; the next question starts another."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            with contextlib.suppress(OSError):
                child.communicate()


_READER = _Reader()


def weight_bytes(path: Path, most: int) -> int:
    """Bytes of the weights in a .keras, .h5 or .hdf5 file, by its own account; 0 where it isn't one.

    Args:
        path: the file.
        most: with more than so many, nothing of it is read.

    Raises:
        InputError: the HDF5 library can't get through it, or its values lie in other files.
    """
    seconds = _SECONDS + (path.stat().st_size + most) / _BYTES_A_SECOND
    found = _READER.ask(path, most, seconds)
    if found is None:
        raise InputError(f"{path} can't be opened: the HDF5 library crashes over it or doesn't end; it is damaged")
    if "refused" in found:
        raise InputError(f"{path} can't be opened: {found['refused']}")
    held = found.get("held", 0)  # what else is wrong with it, Keras says
    return held if isinstance(held, int) else 0
