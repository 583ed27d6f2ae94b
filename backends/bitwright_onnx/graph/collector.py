"""Copying graphs without Python's collector, which would look through everything that the process holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No cyclic collection within, unless something else asks for one; for what makes objects that all stay.

    A copy of a graph is tens of thousands of them, and Python collects by how many there are more: beside frameworks,
    whose own objects it goes through each time, that takes longer than the copy.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
