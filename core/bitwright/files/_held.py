"""Files that are read by calls for as long as something needs them, and noticed when they change meanwhile."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

from bitwright.errors import InputError


class HeldFile:
    """A file that stays open: one that takes its place under its name changes nothing.

    A memory map would do the same with fewer copies, but the system ends a process (SIGBUS) that touches a mapped page
    of which the file has been cut off.

    Attributes:
        path: the file.
        size: in bytes, when it was opened.

    Raises:
        OSError: it can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._handle)
        self._stamp = stamp(self._handle)
        self.size = self._stamp[0]

    def fill(self, offset: int, into: memoryview) -> None:
        """Read the bytes from `offset` on.

        Args:
            into: bytes to be filled.

        Raises:
            InputError: the file can't be read, or isn't as it was when it was opened.
        """
        fill(self.path, self._handle, self._stamp, offset, into)


_POSITION = threading.Lock()
"""Held while a file is read where the system has no call that reads from a place: Windows."""


def _read_at(handle: int, offset: int, into: memoryview) -> int:
    """Read bytes from a place, whatever other threads read of the same file; how many there were."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [into], offset)
    with _POSITION:
        os.lseek(handle, offset, os.SEEK_SET)
        found = os.read(handle, len(into))
    into[: len(found)] = found
    return len(found)


def stamp(handle: int) -> tuple[int, int]:
    """Size and time of change of an open file, which tell that it was written to."""
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns


def fill(path: Path, handle: int, expected: tuple[int, int], offset: int, into: memoryview) -> None:
    """Read bytes of an open file that must be what it was; see `HeldFile.fill`."""
    try:
        if stamp(handle) != expected:
            raise InputError(f"{path} was changed while it was in use; begin again when it is whole")
        while into:
            read = _read_at(handle, offset, into[: 2**30])
            if not read:
                raise InputError(f"{path} was cut short while it was in use; begin again when it is whole")
            into, offset = into[read:], offset + read
    except OSError as error:
        raise InputError(f"can't read {str(path)!r}: {error.strerror or error}") from error
