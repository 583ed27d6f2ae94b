"""Having freed arrays go back to the system at once."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
LARGE = 2**20
"""Bytes of an array that has pages of its own while `giving_back` is open."""
AFTERWARDS = 2**25
"""Bytes that arrays must have later: as many as the C library itself comes to ask of them, once such were freed."""


@contextmanager
def giving_back() -> Iterator[None]:
    """While it is open, arrays of a MiB and more go back to the system as soon as they are freed (glibc).

    By itself the C library asks for more bytes the larger the arrays that were freed, up to 32 MiB. Smaller ones then
    lie in one heap, of which only the end can be given back: weights of parts of a network leave holes there, and the
    process has ever more memory that it doesn't use (mallopt(3)). Taking new pages costs time, which doesn't count
    beside the compilation of a part. Afterwards arrays lie in the heap up to 32 MiB.

    Not where the environment sets one of the library's thresholds: who does has said what is to be kept.
    """
    if _mallopt is None:
        yield
        return
    _open.append(True)
    _mallopt(M_MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        _open.pop()
        if not _open:
            _mallopt(M_MMAP_THRESHOLD, AFTERWARDS)
            _mallopt(M_TRIM_THRESHOLD, 2 * AFTERWARDS)


_open: list[bool] = []
"""One for each `giving_back` that is open."""


def _of_glibc() -> Callable[[int, int], int] | None:
    asked = any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"))
    if asked or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    with suppress(AttributeError, OSError, TypeError, ValueError):
        if os.confstr("CS_GNU_LIBC_VERSION"):
            mallopt: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
            return mallopt
    return None


_mallopt = _of_glibc()
